"""What an artifact was made from, and whether it still is what was written."""
