"""Whatever runs a model: one way to score and to ask it, for every kind of artifact."""
