"""What vLLM refuses in a LoRA adapter, or loads and computes wrongly without a word.

Of vLLM's own sources: `vllm/lora/peft_helper.py` (what of adapter_config.json is read and
refused), `vllm/lora/lora_model.py` and `vllm/lora/utils.py` (which tensor names are parsed),
`vllm/config/lora.py` (which ranks may be served).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qlora_kit.errors import Fault
from qlora_kit.recipe.lora import LoraSpec

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""

_EMBEDDINGS_AND_HEADS = ("embed_tokens", "wte", "word_embeddings", "lm_head", "embed_out")


def max_lora_rank(r: int) -> int | None:
    """The `--max-lora-rank` that an adapter of rank r needs; None where there is none."""
    return next((rank for rank in RANKS if rank >= r), None)


def vllm_faults(lora: LoraSpec) -> Iterator[Fault]:
    """Settings of an adapter that vLLM cannot serve; paths are within `lora`."""
    targets = (
        (lora.target_modules,) if isinstance(lora.target_modules, str) else lora.target_modules
    )
    yield from faults_of_config(
        {
            "r": lora.r,
            "use_dora": lora.use_dora,
            "modules_to_save": lora.modules_to_save,
            "rank_pattern": lora.rank_pattern,
            "alpha_pattern": lora.alpha_pattern,
            "new_tokens": lora.new_tokens,
            "target_modules": targets,
        }
    )


def faults_of_config(config: Mapping[str, Any]) -> Iterator[Fault]:
    """The same from PEFT's adapter_config.json (or a recipe's settings by the same names)."""
    if max_lora_rank(config["r"]) is None:
        yield Fault(
            "r", f"vLLM serves ranks up to {RANKS[-1]}, got {config['r']}", f"use {RANKS[-1]}"
        )
    if config.get("use_dora"):
        yield Fault("use_dora", "vLLM does not load DoRA adapters", "leave it out")
    if config.get("modules_to_save"):
        yield Fault(
            "modules_to_save",
            "vLLM loads no adapter with modules that were trained whole",
            "leave it out, or export merged",
        )
    if config.get("new_tokens") or config.get("trainable_token_indices"):
        yield Fault(
            "new_tokens",
            "vLLM adds low-rank updates only, and new tokens are rows of the embedding",
            "leave them out, or export merged",
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            yield Fault(
                name,
                "vLLM scales every module by the one alpha / r, and would compute these wrongly",
                "leave it out, or export merged",
            )
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield Fault("bias", "vLLM loads no adapter with biases", "export merged")
    yield from _target_faults(config.get("target_modules") or ())


def _target_faults(targets: Iterable[str] | str) -> Iterator[Fault]:
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    found = sorted({part for name in names for part in _EMBEDDINGS_AND_HEADS if part in name})
    if found:
        yield Fault(
            "target_modules",
            f"vLLM takes an update of {', '.join(found)} for some architectures only",
            "leave it out, or export merged",
        )
