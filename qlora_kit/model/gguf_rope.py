"""The stretched position encoding of a GGUF file, which transformers' GGUF loading drops.

Without it a Llama 3.1 or a YaRN model loads, answers short prompts, and is a different model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_kit.errors import ModelError

# What every Llama 3.1 to 3.3 was stretched with; only the factor differs (8, or 32 for the small).
_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_LENGTH = 8192

_SCALING_KEYS = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_IGNORED_KEYS = {"type", "finetuned"}


def rope_scaling(
    metadata: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
) -> dict[str, Any]:
    """What to add to `config.rope_parameters`; empty where positions are not stretched.

    Args:
        metadata: the file's key-value pairs.
        tensors: its tensors by name; `rope_freqs.weight` holds, for each of head_dim / 2
            frequencies, by how much it is divided (float32).

    Raises:
        ModelError: a kind of stretching that cannot be written into a config for sure.
    """
    architecture = metadata["general.architecture"]
    prefix = f"{architecture}.rope.scaling."
    stated = {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix) and key.removeprefix(prefix) not in _IGNORED_KEYS
    }
    kind = metadata.get(f"{prefix}type", "none")
    if "rope_freqs.weight" in tensors:
        theta = float(metadata.get(f"{architecture}.rope.freq_base", 10000.0))
        return _llama3(tensors["rope_freqs.weight"].astype(np.float64).ravel(), theta)
    if kind == "none":
        factors = sorted(name for name in tensors if name.startswith("rope_factors"))
        if not factors:
            return {}
        raise _unknown(f"the tensors {', '.join(factors)}")
    unknown = sorted(set(stated) - set(_SCALING_KEYS))
    if kind not in {"linear", "yarn"} or "factor" not in stated or unknown:
        raise _unknown(f"{prefix}type = {kind!r}" + "".join(f", {key}" for key in unknown))
    return {
        "rope_type": kind,
        **{_SCALING_KEYS[key]: value for key, value in stated.items()},
    }


def add_rope_scaling(parameters: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """`config.rope_parameters` with `scaling` in it: on the full-attention layers, where a model
    keeps the parameters by layer type (its sliding ones are not stretched).
    """
    if "full_attention" in parameters:
        full = {**parameters["full_attention"], **scaling}
        return {**parameters, "full_attention": full}
    return {**parameters, **scaling}


def _llama3(divisors: NDArray[np.float64], theta: float) -> dict[str, Any]:
    """Llama 3.1's parameters, accepted only where they give back the divisors in the file."""
    factor = round(float(divisors.max()), 3)
    expected = llama3_divisors(theta, 2 * len(divisors), factor)
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise _unknown("rope_freqs.weight, which is not Llama 3.1's rule")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_LENGTH,
    }


def llama3_divisors(theta: float, head_dim: int, factor: float) -> NDArray[np.float64]:
    """By how much Llama 3.1 divides each rotary frequency; shape (head_dim / 2,).

    Waves shorter than original length / 4 keep their frequency, those longer than the original
    length are divided by `factor`, and between the two it is interpolated (the reference code of
    arXiv:2407.21783).
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = _LLAMA3_ORIGINAL_LENGTH * frequencies / (2 * math.pi)
    span = _LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR
    smooth = np.clip((turns - _LLAMA3_LOW_FREQ_FACTOR) / span, 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth), dtype=np.float64)


def _unknown(what: str) -> ModelError:
    return ModelError(
        f"this GGUF file stretches its positions in a way that is not known here ({what}), and "
        "transformers would silently leave it out; use the original safetensors model."
    )
