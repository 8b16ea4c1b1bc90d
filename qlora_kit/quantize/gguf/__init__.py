"""GGUF files for llama.cpp: converted and quantized by llama.cpp's own programs."""
