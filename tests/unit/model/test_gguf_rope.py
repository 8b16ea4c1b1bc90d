"""Stretched positions from GGUF metadata, against transformers' own frequencies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qlora_kit.errors import ModelError
from qlora_kit.model.gguf_rope import add_rope_scaling, llama3_divisors, rope_scaling

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def metadata(**scaling: Any) -> dict[str, Any]:
    stated = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    return {"general.architecture": "llama", "llama.rope.freq_base": 500000.0, **stated}


def frequencies(head_dim: int, **parameters: Any) -> np.ndarray:
    config = LlamaConfig(head_dim=head_dim, rope_parameters={"rope_theta": 500000.0, **parameters})
    return LlamaRotaryEmbedding(config).inv_freq.numpy()


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])
def test_llama3_is_recognised_by_its_divisors(factor: float, head_dim: int) -> None:
    stretched = frequencies(head_dim, **LLAMA3, factor=factor)
    divisors = frequencies(head_dim, rope_type="default") / stretched
    np.testing.assert_allclose(llama3_divisors(500000.0, head_dim, factor), divisors, rtol=1e-5)
    found = rope_scaling(metadata(), {"rope_freqs.weight": divisors.astype(np.float32)})
    assert found == {**LLAMA3, "factor": factor}


def test_nothing_stated_is_nothing_stretched() -> None:
    assert rope_scaling(metadata(), {}) == {}
    assert rope_scaling(metadata(type="none", finetuned=False), {}) == {}


def test_linear_and_yarn() -> None:
    assert rope_scaling(metadata(type="linear", factor=8.0), {}) == {
        "rope_type": "linear",
        "factor": 8.0,
    }
    yarn = metadata(type="yarn", factor=4.0, original_context_length=32768, finetuned=True)
    assert rope_scaling(yarn, {}) == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }


@pytest.mark.parametrize(
    ("scaling", "tensors", "match"),
    [
        ({"type": "longrope", "factor": 4.0}, {}, "'longrope'"),
        ({"type": "linear"}, {}, "'linear'"),
        ({"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier"),
        ({}, {"rope_factors_long.weight": np.ones(32)}, "rope_factors_long"),
        ({}, {"rope_freqs.weight": np.linspace(1, 8, 32)}, "not Llama 3.1's rule"),
    ],
)
def test_what_cannot_be_made_sure_of_is_refused(
    scaling: dict[str, Any], tensors: dict[str, np.ndarray], match: str
) -> None:
    with pytest.raises(ModelError, match=match):
        rope_scaling(metadata(**scaling), tensors)


def test_only_full_attention_is_stretched_where_layers_differ() -> None:
    by_layer = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    linear = {"rope_type": "linear", "factor": 8.0}
    assert add_rope_scaling(by_layer, linear) == {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": by_layer["sliding_attention"],
    }
    flat = {"rope_type": "default", "rope_theta": 1e4}
    assert add_rope_scaling(flat, linear) == {**flat, **linear}
