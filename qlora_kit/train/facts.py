"""What decides how a model computes: where it is the same, what was tried before needs no trial."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

import qlora_kit
from qlora_kit.environment import cpu_name
from qlora_kit.model.qat.attach import fake_quantization_of
from qlora_kit.records import file_sha256
from qlora_kit.versions import REPORTED_PACKAGES, package_versions

# Whose code is told by a version, or by its digest.
_KNOWN_PACKAGES = {"torch", "transformers", "peft", "bitsandbytes", "qlora_kit"}
_VERSIONS = (*REPORTED_PACKAGES, "liger-kernel", "triton")
_DECIDING_CODE = ("data", "memory", "model", "train")


def facts_of(model: nn.Module) -> dict[str, Any] | None:
    """Of a model with an adapter: the libraries, this program's own code, the machine, and the
    model but for the values of its weights.

    None where other code takes part, or fake quantization does, whose settings are not seen here.
    """
    if not isinstance(model, PeftModel):
        return None
    roots = {type(one).__module__.partition(".")[0] for one in model.modules()}
    is_patched = any("forward" in one.__dict__ for one in model.modules())
    if roots - _KNOWN_PACKAGES or is_patched or fake_quantization_of(model) is not None:
        return None
    config = model.get_base_model().config
    return {
        **facts_of_machine(next(model.parameters()).device),
        "config": config.to_dict(),
        "attention": config._attn_implementation,
        "adapters": {name: one.to_dict() for name, one in model.peft_config.items()},
        "modules": [(name, type(one).__qualname__) for name, one in model.named_modules()],
        "parameters": [
            (name, tuple(one.shape), str(one.dtype), one.requires_grad)
            for name, one in model.named_parameters()
        ],
    }


def facts_of_machine(device: torch.device) -> dict[str, Any]:
    """The libraries, this program's own code and the machine."""
    return {
        "code": _code(),
        "versions": {**package_versions(_VERSIONS), "python": sys.version},
        "machine": _machine(device),
        "products": torch.get_float32_matmul_precision(),
    }


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


@lru_cache(maxsize=1)
def _code() -> list[str]:
    """The digests of what of this package computes and decides."""
    package = Path(qlora_kit.__file__).parent
    files = [path for part in _DECIDING_CODE for path in sorted((package / part).rglob("*.py"))]
    return [file_sha256(path) for path in files]
