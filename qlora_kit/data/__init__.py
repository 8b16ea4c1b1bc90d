"""Data: reading sources, rendering conversations to token ids, and the built-in demo task."""
