"""The model that is to be quantized: found, and checked before anything is loaded."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from qlora_kit.errors import ModelError
from qlora_kit.model.base import check_vocabulary, num_embeddings, prequantized_settings
from qlora_kit.model.find import find_skeleton
from qlora_kit.model.scan import scan_weights
from qlora_kit.model.stored import require_fitting
from qlora_kit.model.tokenizer import ensure_padding, load_tokenizer
from qlora_kit.model.weights import readable_weights
from qlora_kit.quantize.method import Source

if TYPE_CHECKING:
    from qlora_kit.environment import Hardware
    from qlora_kit.model.weights import WeightFiles
    from qlora_kit.recipe import ModelSpec

_DTYPES = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_source(spec: ModelSpec, hardware: Hardware) -> Source:
    """Resolve a model and check it: its files, its configuration, that every weight is a number.

    Raises:
        ModelError: it is not there, is damaged, or is quantized already.
    """
    found, skeleton = find_skeleton(spec)
    stored = prequantized_settings(skeleton)
    if stored is not None:
        raise ModelError(_quantized_already(found.name, str(stored.get("quant_method"))))
    tokenizer = load_tokenizer(found.folder, spec.chat_template, spec.trust_remote_code)
    check_vocabulary(skeleton.model, tokenizer)
    weights = readable_weights(found.folder, spec.allow_pickle)
    if weights.format == "safetensors":
        require_fitting(skeleton, weights)
    scan = scan_weights(found.folder, spec.allow_pickle)
    scan.require_finite()
    ensure_padding(tokenizer, num_embeddings(skeleton.model))
    return Source(
        name=found.name,
        folder=found.folder,
        skeleton=skeleton,
        tokenizer=tokenizer,
        dtype=_most_common_dtype(weights) or _configured_dtype(skeleton.model.config.dtype),
        fingerprint=scan.fingerprint,
        stored_bytes=weights.total_bytes,
        hardware=hardware,
        hub_id=found.hub_id,
        allow_pickle=spec.allow_pickle,
        trust_remote_code=spec.trust_remote_code,
    )


def _quantized_already(name: str, method: str) -> str:
    if method == "bitsandbytes":
        how = f"make it 16-bit first (qlora-kit dequantize {name} --out DIR), or better take"
    else:
        how = "take"
    return (
        f"{name} is quantized already (with {method}), and what that lost would be lost twice; "
        f"{how} the model that it was made from."
    )


def _most_common_dtype(weights: WeightFiles) -> torch.dtype | None:
    """By number of elements; None for pickles, which are not looked into."""
    counts: Counter[torch.dtype] = Counter()
    for info in weights.tensors.values():
        if info.dtype in _DTYPES:
            counts[_DTYPES[info.dtype]] += info.num_elements
    return counts.most_common(1)[0][0] if counts else None


def _configured_dtype(dtype: object) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
