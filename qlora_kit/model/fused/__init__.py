"""Frozen linear layers with LoRA as one operation of autograd."""
