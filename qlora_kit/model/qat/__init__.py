"""Quantization-aware training: a model that computes with the quantized weights it will have.

`aware.py` says how, `nf4.py` and `integers.py` quantize a weight, `linear.py` computes with it and
lets the gradient through, `attach.py` puts both into a model.
"""
