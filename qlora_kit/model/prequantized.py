"""Checkpoints that are stored quantized, whose own settings hold whatever the recipe says."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import ModelError
from qlora_kit.model.skeleton import load_config, name_matches
from qlora_kit.model.source import find_source
from qlora_kit.recipe import QuantizationSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

    from qlora_kit.model.skeleton import Skeleton
    from qlora_kit.model.source import ModelSource
    from qlora_kit.recipe import ModelSpec

MIXED_METHOD = "qlora-kit-mixed"
"""What config.json says of a checkpoint whose layers are kept in 4 and in 8 bits."""

# By name: a format may stand further down, and is imported where a checkpoint asks for it.
_OWN_FORMATS = {
    "qlora-kit-int8": "qlora_kit.quantize.int8",
    MIXED_METHOD: "qlora_kit.model.mixed_bits",
}


def prequantized_settings(skeleton: Skeleton) -> dict[str, Any] | None:
    """How the checkpoint on disk is quantized already; None where it is not."""
    return _settings(skeleton.model.config)


def is_foreign(stored: dict[str, Any]) -> bool:
    """Whether another than bitsandbytes quantized it: it can be run as it stands, not trained."""
    return stored.get("quant_method") not in ("bitsandbytes", MIXED_METHOD)


def make_known(stored: dict[str, Any]) -> None:
    """Register the kit's own format with transformers, where a checkpoint is in it."""
    module = _OWN_FORMATS.get(str(stored.get("quant_method")))
    if module is not None:
        import_module(module)


def stored_quantization(spec: ModelSpec) -> QuantizationSpec | None:
    """The settings that a bitsandbytes checkpoint was saved with; None where it is not one."""
    source = find_source(spec)
    stored = _settings(load_config(source.folder, spec.trust_remote_code))
    if stored is None or is_foreign(stored):
        return None
    if stored.get("quant_method") == MIXED_METHOD:
        return _mixed(stored)
    skips = tuple(stored.get("llm_int8_skip_modules") or ())
    if _num_bits(stored) == 8:
        return QuantizationSpec(
            load_in_8bit=True,
            int8_threshold=stored.get("llm_int8_threshold", 6.0),
            skip_modules=skips,
        )
    return QuantizationSpec(**_four_bit(stored), skip_modules=skips)


def _mixed(stored: dict[str, Any]) -> QuantizationSpec:
    return QuantizationSpec(
        load_in_4bit=False,
        quant_type=stored["quant_type"],
        double_quant=stored["double_quant"],
        quant_storage=stored["quant_storage"],
        int8_threshold=stored["int8_threshold"],
        overrides=stored["bits"],
    )


def stored_bits(skeleton: Skeleton, stored: dict[str, Any]) -> dict[str, int]:
    """In how many bits a quantized checkpoint keeps each linear module that is quantized."""
    if stored.get("quant_method") == MIXED_METHOD:
        return dict(stored["bits"])
    skips = stored.get("llm_int8_skip_modules") or ()
    bits = _num_bits(stored)
    return {name: bits for name in skeleton.linear_modules if not name_matches(name, list(skips))}


def require_same_quantization(
    source: ModelSource,
    skeleton: Skeleton,
    stored: dict[str, Any],
    quantization: QuantizationSpec,
    wanted: Mapping[str, int],
) -> None:
    """A checkpoint that is quantized already ignores the recipe; say so instead.

    `wanted` are the bits of each module that the recipe would have quantized.

    Raises:
        ModelError: names the first setting that differs, and what to write.
    """
    if stored.get("quant_method") == MIXED_METHOD:
        _require_same_settings(source, _mixed_settings(stored), quantization)
        _require_same_bits(source, stored_bits(skeleton, stored), wanted)
        return
    if is_foreign(stored):
        raise ModelError(
            f"{source.name} is already quantized with {stored.get('quant_method')}, which cannot "
            "be trained here; take the 16-bit model, or a bitsandbytes one."
        )
    bits = _num_bits(stored)
    if bits != quantization.num_bits:
        raise ModelError(
            f"{source.name} is already quantized to {bits} bits, but the recipe asks for "
            f"{quantization.num_bits}; set quantization.load_in_{bits}bit: true, or dequantize it "
            "first (`qlora-kit dequantize`)."
        )
    on_disk = (
        _four_bit(stored)
        if bits == 4
        else {"int8_threshold": stored.get("llm_int8_threshold", 6.0)}
    )
    _require_same_settings(source, on_disk, quantization)
    if quantization.overrides:
        _require_same_bits(source, stored_bits(skeleton, stored), wanted)
    skips = stored.get("llm_int8_skip_modules") or ()
    extra = [name for name in quantization.skip_modules if not name_matches(name, list(skips))]
    if extra:
        raise ModelError(
            f"{source.name} is already quantized, without regard to quantization.skip_modules: "
            f"{', '.join(extra)}; remove it, or take the 16-bit model."
        )


def _mixed_settings(stored: dict[str, Any]) -> dict[str, Any]:
    return {name: stored[name] for name in ("quant_type", "double_quant", "quant_storage")} | {
        "int8_threshold": stored["int8_threshold"]
    }


def _require_same_settings(
    source: ModelSource, on_disk: Mapping[str, Any], quantization: QuantizationSpec
) -> None:
    for name, value in on_disk.items():
        wanted = getattr(quantization, name)
        if value != wanted:
            raise ModelError(
                f"{source.name} is already quantized with {name}: {_yaml(value)}, but the recipe "
                f"says {_yaml(wanted)}; set quantization.{name}: {_yaml(value)}."
            )


def _require_same_bits(
    source: ModelSource, on_disk: Mapping[str, int], wanted: Mapping[str, int]
) -> None:
    for name in {**on_disk, **wanted}:
        is_in, asked = on_disk.get(name, 16), wanted.get(name, 16)
        if is_in != asked:
            raise ModelError(
                f"{source.name} is already quantized, {name} to {is_in} bits, but the recipe's "
                f"quantization.overrides keep it in {asked}; take the 16-bit model, or override "
                "what is so on disk."
            )


def _settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    stored = dict(settings if isinstance(settings, dict) else settings.to_dict())
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        stored.setdefault("quant_method", "bitsandbytes")  # which was the only one until 2023
    return stored


def _num_bits(stored: dict[str, Any]) -> int:
    return 4 if stored.get("load_in_4bit") or stored.get("_load_in_4bit") else 8


def _four_bit(stored: dict[str, Any]) -> dict[str, Any]:
    """Where a checkpoint says nothing, upstream's defaults were in force."""
    return {
        "quant_type": stored.get("bnb_4bit_quant_type", "fp4"),
        "double_quant": stored.get("bnb_4bit_use_double_quant", False),
        "quant_storage": str(stored.get("bnb_4bit_quant_storage") or "uint8").removeprefix(
            "torch."
        ),
    }


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
