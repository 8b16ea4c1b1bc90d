"""Load the frozen base: 4-bit, 8-bit or 16/32-bit, checked before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.errors import ModelError
from qlora_kit.model.bits import quantized_bits
from qlora_kit.model.blocks import refuse_misread
from qlora_kit.model.configured import config_text
from qlora_kit.model.find import find_skeleton
from qlora_kit.model.load import load_model
from qlora_kit.model.prequantized import (
    is_foreign,
    make_known,
    require_same_quantization,
    stored_bits,
)
from qlora_kit.model.prequantized import prequantized_settings as prequantized_settings
from qlora_kit.model.qat.attach import refuse_unaware
from qlora_kit.model.quantized import Quantized, require_quantized
from qlora_kit.model.quantized_cache import entry_folder, load_for_all, load_kept
from qlora_kit.model.scan import scan_weights
from qlora_kit.model.skeleton import Skeleton, is_linear, name_matches
from qlora_kit.model.source import ModelSource, resolve_source
from qlora_kit.model.stored import require_fitting
from qlora_kit.model.targets import refuse_dora, require_targets
from qlora_kit.model.tokenizer import (
    PadChoice,
    ensure_padding,
    load_tokenizer,
    set_template_values,
    stop_ids,
)
from qlora_kit.model.weights import readable_weights
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.startup import UNTIMED, Laps

if TYPE_CHECKING:
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    from qlora_kit.environment import Hardware
    from qlora_kit.model.mixed_bits import MixedBitsConfig
    from qlora_kit.recipe import LoraSpec, ModelSpec, QuantizationAwareSpec, QuantizationSpec

# Architectures whose forward pass scales linear weights in place.
_REWRITES_ITS_WEIGHTS = ("rwkv",)
# Sources whose folder this program has written.
_OWN_KINDS = ("demo", "gguf")
# Quantized parameters, from which on a quantized base is kept in the cache.
_WORTH_KEEPING = 16_000_000


@dataclass(frozen=True)
class Base:
    """A loaded base model and all that belongs to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    skeleton: Skeleton
    fingerprint: str
    """Of its weights."""
    configured: str
    """What its config.json said when it was loaded (`model/configured.py`); empty where that was
    made by this program.
    """
    compute_dtype: torch.dtype
    compute_reason: str
    pad: PadChoice
    quantized: Quantized
    stop_ids: frozenset[int]
    origin: str = ""
    """Whether it was quantized anew or before, in words; empty where nothing was to be quantized or
    it is too small to be kept."""


def load_base(
    spec: ModelSpec,
    quantization: QuantizationSpec,
    compute_dtype: torch.dtype,
    compute_reason: str,
    hardware: Hardware,
    *,
    lora: LoraSpec | None = None,
    aware: QuantizationAwareSpec | None = None,
    adapter: Path | None = None,
    is_shared: bool = False,
    before_reading: Callable[[Skeleton], None] = lambda _: None,
    reporter: Reporter = SILENT,
    laps: Laps = UNTIMED,
) -> Base:
    """Resolve, check, load and quantize a base model.

    Weights load in `compute_dtype`: forward and backward would otherwise dequantize to
    different ones. Given `lora` and `aware`, whatever would hinder that adapter, or quantizing as
    it is trained, is found before the weights are read. Given `adapter`, the tokenizer is the one
    saved with it, whose added tokens have no embeddings until the adapter is loaded. A large
    quantized base is kept in the cache or read from there; with `is_shared` every one is, as other
    processes wait for it. A checkpoint that another library quantized is loaded as it is, unless it
    is to be trained on. `before_reading` may refuse what only its caller can judge, before the
    weights are read.

    Raises:
        ModelError: see the checks below; each names the tensor or module at fault.
        AdapterError: `lora` does not suit this model.
    """
    source, skeleton = find_skeleton(spec)
    stored = prequantized_settings(skeleton)
    bits = quantized_bits(skeleton, quantization)
    if stored is not None:
        make_known(stored)
        as_it_stands = quantization.num_bits == 16 and lora is None and adapter is None
        if not (as_it_stands and is_foreign(stored)):
            require_same_quantization(source, skeleton, stored, quantization, bits)
    _refuse_unsuitable(skeleton, quantization, bits, hardware.device, lora, aware)
    before_reading(skeleton)
    laps.lap("look at the base")
    tokenizer = base_tokenizer(source, spec, adapter)
    if adapter is None:
        check_vocabulary(skeleton.model, tokenizer)
    pad = ensure_padding(tokenizer, num_embeddings(skeleton.model))
    laps.lap("tokenizer")
    fingerprint = _require_sound(source, spec, skeleton, is_stored=stored is not None)
    laps.lap("scan of the weights")
    bnb = None if stored else loading_config(quantization, skeleton, compute_dtype)

    def load(quantized: Path | None) -> PreTrainedModel:
        return load_model(source, spec, bnb, skeleton, compute_dtype, hardware, quantized, reporter)

    is_kept = bnb is not None and (is_shared or _is_worth_keeping(skeleton, bits))
    if bnb is None or not is_kept or spec.trust_remote_code:
        model, origin = load(None), ""
    else:
        configured = skeleton.model.config.to_dict()
        entry = entry_folder(fingerprint, bnb.to_dict(), compute_dtype, hardware.device, configured)
        keep = load_for_all if is_shared else load_kept
        model, origin = keep(entry, load, reporter.warn)
    laps.lap("load and quantize")
    if stored is not None and not is_foreign(stored):
        on_disk = stored_bits(skeleton, stored)
        bits = {name: width for name, width in bits.items() if name in on_disk}
    return Base(
        model=model,
        tokenizer=tokenizer,
        source=source,
        skeleton=skeleton,
        fingerprint=fingerprint,
        configured="" if source.kind in _OWN_KINDS else config_text(source.folder),
        compute_dtype=compute_dtype,
        compute_reason=compute_reason,
        pad=pad,
        quantized=require_quantized(model, quantization, bits),
        stop_ids=stop_ids(model, tokenizer),
        origin=origin,
    )


def _refuse_unsuitable(
    skeleton: Skeleton,
    quantization: QuantizationSpec,
    bits: dict[str, int],
    device: str,
    lora: LoraSpec | None,
    aware: QuantizationAwareSpec | None,
) -> None:
    """Whatever can be seen without weights that this base cannot be made to do."""
    refuse_unquantizable(skeleton, quantization)
    refuse_misread(skeleton, bits, quantization, device)
    trains_adapter = aware is None or aware.train == "adapter"
    if lora is not None and trains_adapter:
        require_targets(skeleton, lora, quantization)
        refuse_dora(lora.use_dora, quantization, device)
    if aware is not None:
        refuse_unaware(skeleton, aware)


def _require_sound(
    source: ModelSource, spec: ModelSpec, skeleton: Skeleton, is_stored: bool
) -> str:
    """The fingerprint of weights that fit the model and are finite."""
    weights = readable_weights(source.folder, spec.allow_pickle)
    if not is_stored and weights.format == "safetensors":
        require_fitting(skeleton, weights)
    scan = scan_weights(source.folder, spec.allow_pickle)
    scan.require_finite()
    return scan.fingerprint


def _is_worth_keeping(skeleton: Skeleton, bits: dict[str, int]) -> bool:
    """Whether it takes longer to quantize than to read what was quantized, and to hash it."""
    counts = (skeleton.model.get_parameter(f"{name}.weight").numel() for name in bits)
    return sum(counts) >= _WORTH_KEEPING


def loading_config(
    quantization: QuantizationSpec, skeleton: Skeleton, compute_dtype: torch.dtype
) -> BitsAndBytesConfig | MixedBitsConfig | None:
    """What a base is loaded with; None for a 16- or 32-bit one.

    Overrides that no skip list can say, 8 bits beside 4 above all, take a quantizer of our own.
    """
    bits = quantized_bits(skeleton, quantization)
    skips = _skips(quantization, skeleton, bits)
    is_plain = len(set(bits.values())) < 2 and not any(name_matches(name, skips) for name in bits)
    if quantization.overrides and not is_plain:
        return _mixed_config(quantization, bits, compute_dtype)
    return bitsandbytes_config(quantization, skeleton, compute_dtype)


def bitsandbytes_config(
    quantization: QuantizationSpec, skeleton: Skeleton, compute_dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """The one place that builds it; None where nothing is quantized. All of one width.

    A skip list of one's own turns the library's off, so the two are united here.
    """
    from transformers import BitsAndBytesConfig

    bits = quantized_bits(skeleton, quantization)
    if not bits and quantization.num_bits == 16:
        return None
    width: int = min(bits.values(), default=quantization.num_bits)
    skips = _skips(quantization, skeleton, bits)
    if width == 8:
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


def _skips(quantization: QuantizationSpec, skeleton: Skeleton, bits: dict[str, int]) -> list[str]:
    """Modules that are not quantized, in the words of the recipe where it has no overrides."""
    if quantization.overrides:
        plain = (name for name in skeleton.linear_modules if name not in bits)
        return sorted({*plain, *skeleton.default_skips})
    return sorted({*quantization.skip_modules, *skeleton.default_skips})


def _mixed_config(
    quantization: QuantizationSpec, bits: dict[str, int], compute_dtype: torch.dtype
) -> MixedBitsConfig:
    from qlora_kit.model.mixed_bits import MixedBitsConfig

    return MixedBitsConfig(
        bits,
        quant_type=quantization.quant_type,
        double_quant=quantization.double_quant,
        quant_storage=quantization.quant_storage,
        compute_dtype=str(compute_dtype).removeprefix("torch."),
        int8_threshold=quantization.int8_threshold,
    )


def refuse_unquantizable(skeleton: Skeleton, quantization: QuantizationSpec) -> None:
    """What bitsandbytes would pass over without a word is an error instead.

    Raises:
        ModelError: fused experts, linear layers of a foreign class, or a skip that skips nothing.
    """
    if not quantization.is_quantized:
        return
    if quantization.num_bits < 16:
        _refuse_experts(skeleton)
    bits = quantized_bits(skeleton, quantization)
    kind = skeleton.model.config.model_type
    if kind in _REWRITES_ITS_WEIGHTS:
        raise ModelError(
            f"{kind} rewrites its weights between training and evaluation, which quantized ones do "
            "not survive; load it in 16 bits (quantization.load_in_4bit: false)."
        )
    skips = quantization.skip_modules
    missed = [name for name in skeleton.foreign_linear_modules if name in bits]
    if missed:
        layer = type(skeleton.model.get_submodule(missed[0])).__name__
        raise ModelError(
            f"{len(missed)} linear layers of {kind} are of a class of their own ({layer}: "
            f"{', '.join(missed[:3])} …), which bitsandbytes does not quantize. Load the model in "
            "16 bits (quantization.load_in_4bit: false), or name them in "
            "quantization.skip_modules."
        )
    read = [name for name in skeleton.read_directly if name in bits]
    if read:
        layers = ", ".join(sorted({name.rpartition(".")[2] for name in read}))
        raise ModelError(
            f"{kind} reads the weights of {layers} past those layers, so they cannot be quantized; "
            f"set quantization.skip_modules: [{layers}]."
        )
    linear = [name for name, module in skeleton.model.named_modules() if is_linear(module)]
    for skip in set(skips) - set(skeleton.default_skips):  # which a stored checkpoint names too
        if not any(name_matches(name, (skip,)) for name in linear):
            raise ModelError(
                f"quantization.skip_modules: {skip} is neither the start nor the end of a linear "
                f"layer's name; one of them is {linear[0]}."
            )


def _refuse_experts(skeleton: Skeleton) -> None:
    """Fused experts are plain parameters, and bitsandbytes quantizes modules."""
    if not skeleton.expert_parameters:
        return
    counted = {name: p.numel() for name, p in skeleton.model.named_parameters()}
    share = sum(counted[name] for name in skeleton.expert_parameters) / sum(counted.values())
    raise ModelError(
        f"{skeleton.model.config.model_type} keeps its experts in fused tensors "
        f"({skeleton.expert_parameters[0]} and {len(skeleton.expert_parameters) - 1} more, "
        f"{share:.0%} of the parameters), which bitsandbytes would leave in 16 bits. Load it "
        "in 16 bits (quantization.load_in_4bit: false), or take a dense model."
    )


def base_tokenizer(
    source: ModelSource, spec: ModelSpec, adapter: Path | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that a base is loaded with: with an adapter, the one that was saved with it.

    Raises:
        ModelError: see `load_tokenizer` and `set_template_values`.
    """
    folder = source.folder
    if adapter is not None:
        folder = adapter
    elif spec.tokenizer_name_or_path is not None:
        folder = resolve_source(spec.tokenizer_name_or_path).folder
    # The template that an adapter was trained with is saved with it.
    if adapter is not None:
        return load_tokenizer(folder, None, spec.trust_remote_code)
    tokenizer = load_tokenizer(folder, spec.chat_template, spec.trust_remote_code)
    set_template_values(tokenizer, spec.chat_template_kwargs)
    return tokenizer


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every id the tokenizer can give must have an embedding."""
    rows = num_embeddings(model)
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer knows {len(tokenizer)} tokens, but the model embeds only {rows}: they "
            "do not belong together. Name the model's own with model.tokenizer_name_or_path."
        )


def num_embeddings(model: PreTrainedModel) -> int:
    """Rows of the input embedding, which may be more than the tokenizer has tokens."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[0])


def upcasts_norms(quantization: QuantizationSpec, compute_dtype: torch.dtype) -> bool:
    """Whether norms are in float32 beside a base that computes in 16 bits."""
    asked = quantization.upcast_norms
    return compute_dtype == torch.float16 if asked == "auto" else asked


def prepare_for_training(model: PreTrainedModel, upcast_norms: bool) -> None:
    """Everything frozen, and norms to float32 where that is asked for; nothing else changes size.

    PEFT's `prepare_model_for_kbit_training` casts every 16-bit parameter up, embeddings, head
    and experts too.
    """
    model.requires_grad_(False)
    if not upcast_norms:
        return
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
    record["upcast_norms"] = upcasts_norms(quantization, compute_dtype)
    return record
