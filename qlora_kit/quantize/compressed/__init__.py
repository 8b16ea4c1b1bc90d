"""`gptq` and `awq` by llmcompressor: checkpoints that stock transformers and vLLM load."""
