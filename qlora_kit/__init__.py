"""QLoRA fine-tuning from one YAML recipe to a merged, measured and certified model."""

__version__ = "0.1.0"
