"""What training takes, counted: by one count a run decides, and a plan foretells."""
