"""A source in memory: as it stands, or quantized while it is read."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.errors import ModelError
from qlora_kit.model.companions import copy_companions
from qlora_kit.model.load import load_model
from qlora_kit.model.shared import state_checksum
from qlora_kit.model.source import ModelSource
from qlora_kit.model.without_bars import without_bars
from qlora_kit.recipe import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from qlora_kit.quantize.method import Source


def kept_dtype(source: Source, dtype: str) -> torch.dtype:
    """What unquantized parts are kept in."""
    kept = source.dtype if dtype == "auto" else getattr(torch, dtype)
    assert isinstance(kept, torch.dtype)
    return kept


def computing_dtype(source: Source) -> torch.dtype:
    """What a source is run in: as stored where the machine has it natively, else float32."""
    hardware = source.hardware
    native = {torch.bfloat16: hardware.native_bf16, torch.float16: hardware.native_fp16}
    return source.dtype if native.get(source.dtype, False) else torch.float32


def load_source(
    source: Source, dtype: torch.dtype, config: QuantizationConfigMixin | None = None
) -> PreTrainedModel:
    """The model with its weights in `dtype`, quantized as `config` says where there is one."""
    return load_model(
        ModelSource(source.name, source.folder, "folder"),
        ModelSpec(
            name_or_path=str(source.folder),
            allow_pickle=source.allow_pickle,
            trust_remote_code=source.trust_remote_code,
        ),
        config,
        source.skeleton,
        dtype,
        source.hardware,
    )


def save_checked(load: Callable[[], PreTrainedModel], source: Source, draft: Path) -> None:
    """Save what `load` gives, load that again as anybody would, and see that it is the same.

    The two are in memory one after the other.

    Raises:
        ModelError: a weight or a scale comes back otherwise.
    """
    model = load()
    dtype = model.config.dtype  # which saving turns into a text
    assert isinstance(dtype, torch.dtype)
    model.save_pretrained(draft)
    wanted = state_checksum(model)
    del model
    gc.collect()
    copy_companions(source.folder, draft, source.trust_remote_code)
    if state_checksum(reload(draft, source, dtype)) != wanted:
        raise ModelError(
            f"{source.name} does not come back from the disk as it was quantized; nothing was "
            "kept. Please report this with the versions that `qlora-kit doctor` shows."
        )


def reload(draft: Path, source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The saved model, by transformers alone."""
    from transformers import AutoModelForCausalLM

    with without_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(
            draft,
            dtype=dtype,
            device_map={"": source.hardware.device},
            trust_remote_code=source.trust_remote_code,
            local_files_only=True,
        )
    loaded: PreTrainedModel = model.eval()
    return loaded
