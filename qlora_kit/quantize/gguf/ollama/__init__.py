"""Ollama's Modelfile: the chat template that was trained, in Go's template language."""
