"""Load the frozen base: 4-bit, 8-bit or 16/32-bit, checked before and after."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_kit.errors import ModelError
from qlora_kit.model.scan import scan_weights
from qlora_kit.model.skeleton import (
    Skeleton,
    build_skeleton,
    is_linear,
    load_config,
    name_matches,
)
from qlora_kit.model.source import ModelSource, resolve_source
from qlora_kit.model.tokenizer import (
    PadChoice,
    ensure_padding,
    load_tokenizer,
    stop_ids,
)

if TYPE_CHECKING:
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    from qlora_kit.environment import Hardware
    from qlora_kit.recipe import ModelSpec, QuantizationSpec


@dataclass(frozen=True)
class Quantized:
    """What share of a model is really quantized; parameters counted as they are, not as packed."""

    num_parameters: int
    num_quantized: int
    weight_bytes: int

    @property
    def share(self) -> float:
        return self.num_quantized / self.num_parameters


@dataclass(frozen=True)
class Base:
    """A loaded base model and all that belongs to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    skeleton: Skeleton
    fingerprint: str
    compute_dtype: torch.dtype
    compute_reason: str
    pad: PadChoice
    quantized: Quantized
    stop_ids: frozenset[int]


def load_base(
    spec: ModelSpec,
    quantization: QuantizationSpec,
    compute_dtype: torch.dtype,
    compute_reason: str,
    hardware: Hardware,
) -> Base:
    """Resolve, check, load and quantize a base model.

    Weights load in `compute_dtype`: forward and backward would otherwise dequantize to
    different ones.

    Raises:
        ModelError: see the checks below; each names the tensor or module at fault.
    """
    source = resolve_source(
        spec.name_or_path,
        spec.revision,
        spec.gguf_file,
        spec.allow_pickle,
        spec.trust_remote_code,
    )
    config = load_config(source.folder, spec.trust_remote_code)
    skeleton = build_skeleton(config, spec.trust_remote_code)
    refuse_experts(skeleton, quantization)
    refuse_foreign_linears(skeleton, quantization)
    scan = scan_weights(source.folder, spec.allow_pickle)
    scan.require_finite()
    tokenizer_folder = source.folder
    if spec.tokenizer_name_or_path is not None:
        tokenizer_folder = resolve_source(spec.tokenizer_name_or_path).folder
    tokenizer = load_tokenizer(tokenizer_folder, spec.chat_template, spec.trust_remote_code)
    pad = ensure_padding(tokenizer)
    model = _load_model(source, spec, quantization, skeleton, compute_dtype, hardware)
    check_vocabulary(model, tokenizer)
    quantized = require_quantized(model, skeleton, quantization)
    return Base(
        model=model,
        tokenizer=tokenizer,
        source=source,
        skeleton=skeleton,
        fingerprint=scan.fingerprint,
        compute_dtype=compute_dtype,
        compute_reason=compute_reason,
        pad=pad,
        quantized=quantized,
        stop_ids=stop_ids(model, tokenizer),
    )


def bitsandbytes_config(
    quantization: QuantizationSpec, skeleton: Skeleton, compute_dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """The one place that builds it; None for a 16- or 32-bit base.

    A skip list of one's own turns the library's off, so the two are united here.
    """
    from transformers import BitsAndBytesConfig

    if quantization.num_bits == 16:
        return None
    skips = sorted({*quantization.skip_modules, *skeleton.default_skips})
    if quantization.load_in_8bit:
        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=quantization.int8_threshold,
            llm_int8_skip_modules=skips,
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=getattr(torch, quantization.quant_storage),
        llm_int8_skip_modules=skips,
    )


def prequantized_settings(skeleton: Skeleton) -> dict[str, Any] | None:
    """How the checkpoint on disk is quantized already; None where it is not."""
    settings = getattr(skeleton.model.config, "quantization_config", None)
    if settings is None:
        return None
    return dict(settings if isinstance(settings, dict) else settings.to_dict())


def stored_quantization(spec: ModelSpec) -> QuantizationSpec | None:
    """The settings that a bitsandbytes checkpoint was saved with; None where it is not one."""
    from qlora_kit.recipe import QuantizationSpec

    source = resolve_source(
        spec.name_or_path,
        spec.revision,
        spec.gguf_file,
        spec.allow_pickle,
        spec.trust_remote_code,
    )
    settings = getattr(
        load_config(source.folder, spec.trust_remote_code), "quantization_config", None
    )
    if settings is None:
        return None
    stored = settings if isinstance(settings, dict) else settings.to_dict()
    if stored.get("quant_method") != "bitsandbytes":
        return None
    if not (stored.get("load_in_4bit") or stored.get("_load_in_4bit")):
        return QuantizationSpec(load_in_4bit=False, load_in_8bit=True)
    return QuantizationSpec(
        quant_type=stored.get("bnb_4bit_quant_type", "fp4"),
        double_quant=stored.get("bnb_4bit_use_double_quant", False),
    )


def refuse_experts(skeleton: Skeleton, quantization: QuantizationSpec) -> None:
    """Fused experts are plain parameters, which bitsandbytes passes over without a word."""
    if skeleton.expert_parameters and quantization.num_bits < 16:
        counted = {name: p.numel() for name, p in skeleton.model.named_parameters()}
        inside = sum(counted[name] for name in skeleton.expert_parameters)
        share = inside / sum(counted.values())
        raise ModelError(
            f"{skeleton.model.config.model_type} keeps its experts in fused tensors "
            f"({skeleton.expert_parameters[0]} and {len(skeleton.expert_parameters) - 1} more, "
            f"{share:.0%} of the parameters), which bitsandbytes would leave in 16 bits. Load it "
            "in 16 bits (quantization.load_in_4bit: false), or take a dense model."
        )


def refuse_foreign_linears(skeleton: Skeleton, quantization: QuantizationSpec) -> None:
    """Subclasses of a linear layer would stay in 16 bits without a word as well."""
    missed = [
        name
        for name in skeleton.foreign_linear_modules
        if not name_matches(name, list(quantization.skip_modules))
    ]
    if missed and quantization.num_bits < 16:
        raise ModelError(
            f"{len(missed)} linear layers of {skeleton.model.config.model_type} are of a class of "
            f"their own, which bitsandbytes does not quantize ({', '.join(missed[:3])} …). Load the "
            "model in 16 bits (quantization.load_in_4bit: false), or name them in "
            "quantization.skip_modules."
        )


def _load_model(
    source: ModelSource,
    spec: ModelSpec,
    quantization: QuantizationSpec,
    skeleton: Skeleton,
    compute_dtype: torch.dtype,
    hardware: Hardware,
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    bnb = bitsandbytes_config(quantization, skeleton, compute_dtype)
    stored = prequantized_settings(skeleton)
    if stored is not None:
        _require_same_quantization(source, stored, quantization)
        bnb = None
    options: dict[str, Any] = {
        "dtype": compute_dtype,
        "quantization_config": bnb,
        "device_map": {"": hardware.device if hardware.device == "cpu" else f"{hardware.device}:0"},
        "trust_remote_code": spec.trust_remote_code,
        "use_safetensors": not spec.allow_pickle,
        "local_files_only": True,
    }
    if spec.attn_implementation != "auto":
        options["attn_implementation"] = spec.attn_implementation
    if bnb is None:
        options.pop("quantization_config")
    if spec.allow_pickle:
        options["use_safetensors"] = None
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model = AutoModelForCausalLM.from_pretrained(source.folder, **options)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{source.name} cannot be loaded: {reason}") from error
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = compute_dtype  # a prequantized checkpoint keeps its own
            module.compute_type_is_set = True
    model.requires_grad_(False)
    model.eval()
    return model


def _require_same_quantization(
    source: ModelSource, stored: dict[str, Any], quantization: QuantizationSpec
) -> None:
    """A checkpoint that is quantized already ignores the recipe; say so instead."""
    if stored.get("quant_method") != "bitsandbytes":
        raise ModelError(
            f"{source.name} is already quantized with {stored.get('quant_method')}, which cannot be "
            "trained here; take the 16-bit model, or a bitsandbytes one."
        )
    bits = 4 if stored.get("load_in_4bit") or stored.get("_load_in_4bit") else 8
    if bits != quantization.num_bits:
        raise ModelError(
            f"{source.name} is already quantized to {bits} bits, but the recipe asks for "
            f"{quantization.num_bits}; set quantization.load_in_{bits}bit: true, or dequantize it first "
            "(`qlora-kit dequantize`)."
        )
    if bits == 4:
        asked = {
            "quant_type": (
                stored.get("bnb_4bit_quant_type", "fp4"),
                quantization.quant_type,
            ),
            "double_quant": (
                stored.get("bnb_4bit_use_double_quant", False),
                quantization.double_quant,
            ),
        }
        for name, (on_disk, wanted) in asked.items():
            if on_disk != wanted:
                raise ModelError(
                    f"{source.name} is already quantized with {name}: {on_disk}, but the recipe "
                    f"says {wanted}; set quantization.{name}: {str(on_disk).lower()}."
                )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every id the tokenizer can give must have an embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer knows {len(tokenizer)} tokens, but the model embeds only {rows}: they "
            "do not belong together. Name the model's own with model.tokenizer_name_or_path."
        )


def count_quantized(model: nn.Module) -> Quantized:
    """Count parameters as they are: two packed ones in each byte of a 4-bit weight."""
    total = quantized = num_bytes = 0
    for parameter in model.parameters():
        kind = type(parameter).__name__
        count = parameter.numel()
        num_bytes += parameter.numel() * parameter.element_size()
        if kind == "Params4bit" and parameter.quant_state is not None:
            count = parameter.quant_state.shape.numel()
            num_bytes += _quant_state_bytes(parameter.quant_state)
        if kind in ("Params4bit", "Int8Params"):
            quantized += count
        total += count
    return Quantized(total, quantized, num_bytes)


def _quant_state_bytes(state: Any) -> int:
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def require_quantized(
    model: PreTrainedModel, skeleton: Skeleton, quantization: QuantizationSpec
) -> Quantized:
    """Fail when a linear layer that should be quantized is not.

    Raises:
        ModelError: names the layers.
    """
    counted = count_quantized(model)
    if quantization.num_bits == 16:
        return counted
    skips = (*quantization.skip_modules, *skeleton.default_skips)
    missed = [
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and type(module.weight).__name__ not in ("Params4bit", "Int8Params")
        and not name_matches(name, skips)
    ]
    if missed:
        raise ModelError(
            f"{len(missed)} linear layers were left unquantized ({', '.join(missed[:3])} …). Name "
            "them in quantization.skip_modules if that is meant."
        )
    if counted.num_quantized == 0:
        raise ModelError(
            "nothing was quantized: the model has no linear layer that bitsandbytes handles. "
            "Load it in 16 bits with quantization.load_in_4bit: false."
        )
    return counted


def prepare_for_training(model: PreTrainedModel) -> None:
    """Norms to float32, everything frozen; nothing else changes size.

    PEFT's `prepare_model_for_kbit_training` casts every 16-bit parameter up, embeddings, head
    and experts too.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.float()


def quantization_record(
    quantization: QuantizationSpec, compute_dtype: torch.dtype
) -> dict[str, Any]:
    """What a manifest says about how the base was kept."""
    record = quantization.model_dump(mode="json")
    record["compute_dtype"] = str(compute_dtype).removeprefix("torch.")
    return record


def describe_quantized(quantized: Quantized) -> dict[str, Any]:
    return {**asdict(quantized), "share": quantized.share}
