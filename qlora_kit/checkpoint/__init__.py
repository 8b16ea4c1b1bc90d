"""The run directory and what is saved in it."""
