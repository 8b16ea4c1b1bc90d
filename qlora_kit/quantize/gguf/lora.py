"""A LoRA adapter as GGUF, to be loaded beside its base (`--lora`, Ollama's ADAPTER).

llama.cpp knows one form: two matrices for each weight, scaled by alpha / r with one alpha for all.
Its converter takes an adapter's files as if they were of that form, and says nothing where they
are not; so they are brought into it here first, exactly, or refused.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.quantize.gguf.scripts import CONVERT_LORA, LlamaCpp, run_script

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_PAIR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")

# What llama.cpp has no form for, by the setting that asks for it.
_REFUSED = {
    "use_dora": "DoRA's magnitudes",
    "modules_to_save": "modules that were trained whole (lora.modules_to_save)",
    "trainable_token_indices": "new or retrained tokens (lora.new_tokens)",
    "target_parameters": "updates of fused experts",
    "lora_bias": "biases of the update",
    "layer_replication": "replicated layers",
    "use_qalora": "pooled inputs (QA-LoRA)",
    "use_bdlora": "block-diagonal updates",
}


@dataclass(frozen=True)
class LoraFile:
    """What was written: one pair of matrices for each module."""

    num_modules: int
    alpha: float
    num_rescaled: int
    """Modules whose scale is not alpha / r (rsLoRA, alpha_pattern): it went into the matrix B."""


def require_expressible(adapter: Path) -> dict[str, Any]:
    """The adapter's settings, if llama.cpp can run it beside its base.

    Raises:
        AdapterError: it has what llama.cpp has no form for; names it, and says what to do.
    """
    path = adapter / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read ({error}); name an adapter's folder.") from None
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{adapter} holds {config.get('peft_type')}, not a LoRA adapter.")
    found = [what for key, what in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append("trained biases")
    if found:
        raise AdapterError(
            f"{adapter} has {' and '.join(found)}, which no GGUF adapter can hold; merge it first, "
            "and export the merged model as GGUF."
        )
    return config


def convert_lora(
    llama: LlamaCpp, adapter: Path, base: Path, outfile: Path, outtype: str = "f32"
) -> LoraFile:
    """Write the adapter as GGUF.

    Args:
        base: the folder of the model that it was trained on; only its configuration counts.
        outtype: f32 keeps the trained numbers; f16, bf16 and q8_0 round them.

    Raises:
        AdapterError: llama.cpp has no form for it.
        ModelError: llama.cpp does not know the architecture.
    """
    config = require_expressible(adapter)
    tensors = _read(adapter)
    conv1d = _transposed_modules(base)
    plain, num_rescaled = _plain_form(adapter, config, tensors, conv1d)
    alpha = float(config["lora_alpha"])
    with tempfile.TemporaryDirectory() as scratch:
        save_file(plain, Path(scratch) / WEIGHTS_FILE)
        settings = {**config, "lora_alpha": alpha, "use_rslora": False, "alpha_pattern": {}}
        (Path(scratch) / CONFIG_FILE).write_text(json.dumps(settings))
        options = ["--base", str(base.resolve()), "--outfile", str(outfile.resolve())]
        script = llama.folder / CONVERT_LORA
        try:
            run_script(llama, script, [*options, "--outtype", outtype, scratch])
        except ModelError as failed:
            raise ModelError(f"{adapter} cannot be made a GGUF adapter: {failed}") from failed
    _require_whole(outfile, len(plain))
    return LoraFile(len(plain) // 2, alpha, num_rescaled)


def _read(adapter: Path) -> dict[str, torch.Tensor]:
    path = adapter / WEIGHTS_FILE
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read ({error}).") from None


def _plain_form(
    adapter: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    conv1d: frozenset[str],
) -> tuple[dict[str, torch.Tensor], int]:
    """The same update, scaled by alpha / r everywhere, and as the converter takes a Conv1D."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _PAIR.match(key)
        if match is None:
            raise AdapterError(
                f"{adapter}: {key} is no matrix of a linear layer's update, so no GGUF adapter can "
                "hold it; merge the adapter first, and export the merged model as GGUF."
            )
        pairs.setdefault(match["module"], {})[match["side"]] = tensor.float()
    plain: dict[str, torch.Tensor] = {}
    num_rescaled = 0
    for module, sides in pairs.items():
        a, b = sides["A"], sides["B"]
        name = module.removeprefix(_PREFIX)
        factor = _scale(config, name, a.shape[0]) / (float(config["lora_alpha"]) / a.shape[0])
        if abs(factor - 1.0) > 1e-9:
            b = b * factor
            num_rescaled += 1
        if name in conv1d:  # the converter turns the weights of these around
            a, b = b.T, a.T
        plain[f"{module}.lora_A.weight"] = a.contiguous()
        plain[f"{module}.lora_B.weight"] = b.contiguous()
    return plain, num_rescaled


def _scale(config: dict[str, Any], module: str, r: int) -> float:
    """What PEFT multiplies this module's B A with."""
    from peft.utils.other import get_pattern_key

    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"]))
    return alpha / r**0.5 if config.get("use_rslora") else alpha / r


def _transposed_modules(base: Path) -> frozenset[str]:
    """Modules that keep their weight as (in, out), which GPT-2's kind does."""
    from transformers.pytorch_utils import Conv1D

    from qlora_kit.model.skeleton import build_skeleton, load_config

    model = build_skeleton(load_config(base)).model
    return frozenset(name for name, one in model.named_modules() if isinstance(one, Conv1D))


def _require_whole(outfile: Path, expected: int) -> None:
    """The converter leaves out what it has no name for in some architectures."""
    from qlora_kit.runtime.gguf_header import read_header

    got = len(read_header(outfile).tensors)
    if got != expected:
        outfile.unlink()
        raise ModelError(
            f"llama.cpp's converter kept {got} of the adapter's {expected} matrices, so the file "
            "would be another adapter; merge it first, and export the merged model as GGUF."
        )
