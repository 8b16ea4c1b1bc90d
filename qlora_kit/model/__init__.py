"""Base models, adapters on them, and what they cost in memory."""
