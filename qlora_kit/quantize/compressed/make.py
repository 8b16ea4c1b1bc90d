"""From a source to a folder of packed weights that was read back."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.errors import ModelError
from qlora_kit.model.companions import copy_companions
from qlora_kit.model.skeleton import is_linear
from qlora_kit.model.without_bars import without_bars
from qlora_kit.quantize.compressed.oneshot import quantize_with
from qlora_kit.quantize.compressed.options import CompressedOptions
from qlora_kit.quantize.compressed.warnings import notes_of
from qlora_kit.quantize.layers import quantized_layers
from qlora_kit.quantize.load import kept_dtype, load_source, reload
from qlora_kit.quantize.method import Calibration, Made, Source
from qlora_kit.quantize.small import skips_that_fit, some_text, try_on_small
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECK_TOKENS = 32
# Of logits, as a share of the largest, between what was saved and what is read back.
_TOLERANCE = 1e-3


def layer_groups(source: Source, options: CompressedOptions, symmetric: bool) -> dict[str, Any]:
    """What llmcompressor's modifiers are told: every linear layer but those left out."""
    names = set(quantized_layers(source.skeleton, options.skip_modules))
    left_out = [
        name
        for name, module in source.skeleton.model.named_modules()
        if is_linear(module) and name not in names
    ]
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if options.group_size is None else "group",
        "group_size": options.group_size,
    }
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": left_out,
    }


def make_compressed(
    modifiers: Sequence[Any],
    source: Source,
    options: CompressedOptions,
    calibration: Calibration,
    draft: Path,
    reporter: Reporter,
    name: str,
) -> Made:
    """Quantize in float32 on a CPU, which is slow in 16 bits, and keep scales as asked."""
    is_on_cpu = source.hardware.device == "cpu"
    dtype = torch.float32 if is_on_cpu else kept_dtype(source, options.dtype)
    load = partial(load_source, source, dtype)
    return _quantize(modifiers, load, source, options, calibration, draft, reporter, name)


def _quantize(
    modifiers: Sequence[Any],
    load: Callable[[], PreTrainedModel],
    source: Source,
    options: CompressedOptions,
    calibration: Calibration,
    draft: Path,
    reporter: Reporter,
    name: str,
) -> Made:
    """What was saved is loaded again, when the model that it was saved from is gone."""
    model = load()
    names = quantized_layers(source.skeleton, options.skip_modules)
    dtype = kept_dtype(source, options.dtype)
    with reporter.progress(f"quantizing with {name}", len(names)) as progress:
        told = quantize_with(
            modifiers, model, source.tokenizer, calibration.sequences, names, progress
        )
    _save(model, dtype, draft)
    copy_companions(source.folder, draft, source.trust_remote_code)
    ids = _check_ids(calibration)
    wanted = _logits(model, ids)
    del model
    gc.collect()
    found = _logits(reload(draft, source, dtype), ids)
    difference = float((found - wanted).abs().max())
    if not difference <= _TOLERANCE * float(wanted.abs().max()):
        raise ModelError(
            f"{source.name} does not come back from the disk as it was quantized: logits differ "
            f"by {difference:.2g}; nothing was kept. Please report this with the versions that "
            "`qlora-kit doctor` shows."
        )
    return Made(
        findings={
            "num_layers": len(names),
            "reload_logit_difference": difference,
            "warnings": told,
        },
        notes=(f"{len(names)} linear layers in {options.bits} bits", *notes_of(told)),
    )


def try_small(
    modifiers: Callable[[Source, Any], Sequence[Any]],
    source: Source,
    options: CompressedOptions,
    name: str,
) -> str:
    """As `Method.try_small`; a scale for each row, as narrow ones need not hold whole groups."""

    def attempt(small: Source, model: PreTrainedModel) -> None:
        skips = skips_that_fit(small.skeleton, options.skip_modules)
        fitting = options.model_copy(update={"group_size": None, "skip_modules": skips})
        chosen = modifiers(small, fitting)
        with TemporaryDirectory(prefix=f"qlora-kit-{name}-") as scratch:
            config, draft = Path(scratch) / "config", Path(scratch) / "draft"
            model.config.save_pretrained(config)
            model.config.name_or_path = str(config)  # where llmcompressor reads it again
            draft.mkdir()
            _quantize(chosen, lambda: model, small, fitting, some_text(), draft, SILENT, name)

    return try_on_small(source, attempt)


def _save(model: PreTrainedModel, dtype: torch.dtype, draft: Path) -> None:
    """Pack the weights, then round what stays floating."""
    from compressed_tensors.compressors import ModelCompressor

    compressor = ModelCompressor.from_pretrained_model(model)
    with warnings.catch_warnings(), without_bars():
        compressor.compress_model(model)
        # Saving prepares the model to unpack itself at its next pass, which can happen only once.
        compressor.remove_decompression_hook(model)
        for parameter in model.parameters():  # not buffers: rotary frequencies stay in float32
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(draft)
    (draft / "recipe.yaml").unlink()  # llmcompressor's own, of a session that has ended: empty


def _check_ids(calibration: Calibration) -> torch.Tensor:
    longest = max(calibration.sequences, key=lambda one: len(one.input_ids))
    return torch.tensor([longest.input_ids[:_CHECK_TOKENS]])


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), without_bars():  # of unpacking, at the first pass
        output = model.eval()(input_ids=ids.to(model.device), use_cache=False)
    logits: torch.Tensor = output.logits
    return logits.float().cpu()
