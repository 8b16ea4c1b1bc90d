"""An adapter on disk: PEFT's files, its tokenizer, and the manifest that ties it to its base."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from qlora_kit.atomic import replaced_folder
from qlora_kit.errors import AdapterError
from qlora_kit.model.base import Base, num_embeddings
from qlora_kit.model.manifest import (
    MANIFEST_FILE,
    Manifest,
    changed_circumstances,
    manifest_for,
    manifest_text,
    read_manifest,
    require_own_base,
    write_manifest,
)
from qlora_kit.model.qat.attach import aware_record, make_aware
from qlora_kit.model.qat.aware import Aware
from qlora_kit.model.reason import reason_of
from qlora_kit.model.targets import refuse_dora

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.recipe import QuantizationSpec

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save_adapter(
    model: PeftModel,
    base: Base,
    quantization: QuantizationSpec,
    recipe_sha256: str,
    folder: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter so that it is in `folder` whole or not at all; an older one is replaced.

    `weights`: see `write_adapter`.
    """
    with replaced_folder(folder) as draft:
        write_adapter(model, base, quantization, recipe_sha256, draft, weights)


def write_adapter(
    model: PeftModel,
    base: Base,
    quantization: QuantizationSpec,
    recipe_sha256: str,
    folder: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter's files into an empty folder: PEFT's, the tokenizer's, the manifest.

    `weights` are the trainable ones by their names in the model, where it does not hold them whole.
    """
    _in_order(model.peft_config["default"])
    # "auto" would ask the hub whether the vocabulary grew, and offline leave out grown rows.
    given = {} if weights is None else {"state_dict": dict(weights)}
    model.save_pretrained(folder, save_embedding_layers=False, **given)
    write_tokenizer(base.tokenizer, folder)
    if base.model.generation_config is not None:
        base.model.generation_config.save_pretrained(folder)
    readme = folder / "README.md"
    readme.unlink(missing_ok=True)  # PEFT's is a form to fill in
    manifest = manifest_for(base, quantization, recipe_sha256, folder, aware_record(model))
    write_manifest(manifest, folder)


@dataclass(frozen=True)
class AdapterFiles:
    """The files of an adapter in training, which is written again and again: only its weights
    change, and all the rest is made once.
    """

    unchanging: Mapping[str, bytes]
    digests: Mapping[str, str]
    """SHA-256 of each of those."""
    names: Mapping[str, str]
    """Of each tensor in the file of weights, the parameter or buffer of the model that it is."""
    manifest: Manifest
    """Without the file of weights."""

    def manifest_with(self, weights_sha256: str) -> bytes:
        files = dict(sorted({**self.manifest.files, WEIGHTS_FILE: weights_sha256}.items()))
        return manifest_text(replace(self.manifest, files=files)).encode("utf-8")


def adapter_files(
    model: PeftModel, base: Base, quantization: QuantizationSpec, recipe_sha256: str
) -> AdapterFiles:
    """What `write_adapter` would write, but for the weights' values."""
    from peft import get_peft_model_state_dict

    held = {name: tensor.new_empty(0) for name, tensor in model.state_dict().items()}
    name_of = {id(tensor): name for name, tensor in held.items()}
    saved = get_peft_model_state_dict(model, state_dict=held, save_embedding_layers=False)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_adapter(model, base, quantization, recipe_sha256, folder, weights=held)
        (folder / WEIGHTS_FILE).unlink()
        manifest = manifest_for(base, quantization, recipe_sha256, folder, aware_record(model))
        unchanging = {name: (folder / name).read_bytes() for name in manifest.files}
    return AdapterFiles(
        unchanging=unchanging,
        digests=manifest.files,
        names={name: name_of[id(tensor)] for name, tensor in sorted(saved.items())},
        manifest=manifest,
    )


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises OSError where the disk refuses; the library says so by a plain Exception."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        refused = _OS_ERROR.search(str(error))
        if type(error) is not Exception or refused is None:
            raise
        number = int(refused[1])
        raise OSError(number, os.strerror(number), str(folder)) from error


def _in_order(config: PeftConfig) -> None:
    """PEFT keeps names in sets, and writes them in an order that differs from run to run."""
    for key in ("target_modules", "exclude_modules"):
        value = getattr(config, key)
        if isinstance(value, set):
            setattr(config, key, sorted(value))


def load_adapter(
    base: Base, quantization: QuantizationSpec, folder: Path, force: bool = False
) -> tuple[PeftModel, list[str]]:
    """Put a saved adapter on a base that it belongs to, quantized as in training where that was
    aware of it.

    Returns it with what a user should know: precision or versions other than in training, and
    under `force` what makes this another base.

    The base's tokenizer must be the adapter's own where tokens were added.

    Raises:
        AdapterError: another base, a damaged file, or no adapter.
    """
    from peft import PeftModel

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} holds no adapter (no {name}).")
    differing = require_own_base(folder, base, quantization, force)
    findings = [f"forced onto another base: {one}" for one in differing]
    aware = None
    if (folder / MANIFEST_FILE).is_file():
        manifest = read_manifest(folder)
        findings += changed_circumstances(manifest, base)
        aware = Aware.from_record(manifest.quantization_aware)
    if len(base.tokenizer) > num_embeddings(base.model):
        base.model.resize_token_embeddings(len(base.tokenizer), mean_resizing=False)
    try:
        model = PeftModel.from_pretrained(base.model, str(folder), is_trainable=False)
        _read_in_float32(model, folder)
    except (ValueError, RuntimeError, LookupError, TypeError, OSError, SafetensorError) as error:
        raise AdapterError(
            f"{folder} cannot be loaded onto {base.source.name}: {reason_of(error)}"
        ) from error
    refuse_dora(model.peft_config["default"].use_dora, quantization, base.model.device.type)
    make_aware(base.model, base.skeleton, aware, base.compute_dtype)
    model.eval()
    return model, findings


def _read_in_float32(model: PeftModel, folder: Path) -> None:
    """What modules_to_save trained in float32, PEFT has rounded to the dtype of the base."""
    from peft import load_peft_weights, set_peft_model_state_dict
    from peft.utils import ModulesToSaveWrapper

    rounded = [
        parameter
        for wrapper in model.modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
        for parameter in wrapper.modules_to_save.parameters()
        if parameter.dtype != torch.float32
    ]
    for parameter in rounded:
        parameter.data = parameter.data.float()
    if rounded:
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
