"""What a model is worth: perplexity, divergence from another model, and its own answers."""
