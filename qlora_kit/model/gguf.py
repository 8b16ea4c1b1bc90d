"""GGUF files as plain model folders: weights in safetensors, with a correct tokenizer.

A GGUF file cannot be trained on as it is (transformers refuses to, and to quantize it again), so
it is dequantized once into a folder that any tool reads, and kept.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_kit.atomic import ANOTHER_CACHE, published_folder, require_disk
from qlora_kit.environment import cache_dir, probe_hardware
from qlora_kit.errors import HardwareError, ModelError
from qlora_kit.model.gguf_rope import add_rope_scaling, rope_scaling
from qlora_kit.model.gguf_tokenizer import build_tokenizer
from qlora_kit.model.without_bars import without_bars
from qlora_kit.records import file_sha256

logger = logging.getLogger(__name__)

CONVERSION_VERSION = 1
"""Raised when converted folders change, so that folders of an older version are not taken."""

RECORD_NAME = "conversion.json"

_TOKENIZER_BYTES = 32 * 2**20
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# Tensors that hold no weights: they come back as settings (`gguf_rope`).
_SETTING_TENSORS = ("rope_freqs.", "rope_factors_")


@dataclass(frozen=True)
class GgufConversion:
    """What was converted, and what could not be made sure of; kept in the folder as JSON."""

    source: str
    source_sha256: str
    architecture: str
    dtype: str
    version: int
    warnings: tuple[str, ...]


def convert_cached(gguf_path: Path, *, dtype: str = "auto") -> Path:
    """The model folder for a GGUF file, converted on first use into the user's cache.

    The folder's name starts with the file's SHA-256, so a file changed in place is a new model.

    Raises:
        ModelError, HardwareError: as `gguf_to_folder`.
    """
    _require_gguf(gguf_path)
    digest = file_sha256(gguf_path)
    name = f"{digest[:16]}-{gguf_path.stem}-{dtype}-v{CONVERSION_VERSION}"
    return gguf_to_folder(gguf_path, cache_dir() / "gguf" / name, dtype=dtype, sha256=digest)


def gguf_to_folder(
    gguf_path: Path, folder: Path, *, dtype: str = "auto", sha256: str | None = None
) -> Path:
    """Dequantize a GGUF file into `folder`, unless that already holds a conversion.

    Args:
        dtype: float32 holds what every GGUF type means exactly, at 4 bytes of disk and memory per
            parameter. `auto` takes the narrowest type that loses nothing worth keeping: float32
            or float16 for files written in these, otherwise bfloat16, which rounds by at most
            2^-9, several times less than the finest GGUF block type (Q8_0) already has.
        sha256: the file's digest, where the caller has it already.

    Raises:
        ModelError: no readable GGUF file, or one that transformers cannot load whole.
        HardwareError: not enough disk or memory.
    """
    if folder.exists():
        return converted_folder(folder)
    reader = _open(gguf_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    _require_whole_model(gguf_path, metadata)
    scaling = rope_scaling(metadata, {tensor.name: tensor.data for tensor in reader.tensors})
    dtype = _fitting_dtype(reader) if dtype == "auto" else dtype
    _require_room(gguf_path, folder, reader, dtype)

    with tempfile.TemporaryDirectory() as alone:
        # Alone in a folder, so that files beside it cannot change what is made of it.
        linked = Path(alone) / gguf_path.name
        linked.symlink_to(gguf_path.resolve())
        model = _load(linked, metadata, dtype)
        tokenizer, warnings = build_tokenizer(linked, metadata)
    _require_fitting_shapes(gguf_path, model)
    _require_all_used(gguf_path, reader, model)
    _require_finite(gguf_path, model)
    if scaling:
        model.config.rope_parameters = add_rope_scaling(model.config.rope_parameters, scaling)
    _set_token_ids(model, tokenizer, metadata)
    record = GgufConversion(
        source=gguf_path.name,
        source_sha256=sha256 or file_sha256(gguf_path),
        architecture=str(metadata["general.architecture"]),
        dtype=dtype,
        version=CONVERSION_VERSION,
        warnings=tuple(warnings),
    )
    with published_folder(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / RECORD_NAME).write_text(json.dumps(asdict(record), indent=2) + "\n")
    return converted_folder(folder)


def converted_folder(folder: Path) -> Path:
    """`folder`, if it holds a conversion; what that could not make sure of is logged again.

    Raises:
        ModelError: it holds something else.
    """
    record = folder / RECORD_NAME
    if not record.is_file() or not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} exists but is no converted model (no {RECORD_NAME}); move it away."
        )
    for warning in json.loads(record.read_text())["warnings"]:
        logger.warning("%s: %s", folder.name, warning)
    return folder


def _require_gguf(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"there is no GGUF file at {path}; check model.name_or_path.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'; "
            "it may be another format, or a download that failed."
        )


def _open(path: Path) -> gguf.GGUFReader:
    _require_gguf(path)
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelError(
            f"{path} is truncated or damaged ({error}); its size is {path.stat().st_size:,} "
            "bytes: fetch it again and compare its checksum."
        ) from error


def _require_whole_model(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse what is a GGUF file but no model by itself, before any work is done."""
    if "general.architecture" not in metadata:
        raise ModelError(f"{path} is damaged: it does not say its general.architecture.")
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ModelError(f"{path} holds a GGUF {kind}, not a model; name the model's file.")
    num_parts = metadata.get("split.count", 1)
    if num_parts > 1:
        raise ModelError(
            f"{path} is one of {num_parts} parts of a model; join them first "
            "(llama.cpp: `llama-gguf-split --merge FIRST_PART OUTPUT`)."
        )


def _fitting_dtype(reader: gguf.GGUFReader) -> str:
    """The narrowest dtype that loses nothing worth keeping, by the type of most weights."""
    weights: Counter[str] = Counter()
    for tensor in reader.tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    most = weights.most_common(1)[0][0] if weights else "F32"
    return {"F64": "float32", "F32": "float32", "F16": "float16"}.get(most, "bfloat16")


def _require_room(path: Path, folder: Path, reader: gguf.GGUFReader, dtype: str) -> None:
    num_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    needed = num_weights * _DTYPES[dtype].itemsize + _TOKENIZER_BYTES
    require_disk(folder.parent, needed, f"the weights of {path.name} in {dtype}", ANOTHER_CACHE)
    memory = probe_hardware().host_memory_bytes
    if needed > memory:
        raise HardwareError(
            f"converting {path.name} to {dtype} needs {needed:,} bytes of memory, and this machine "
            f"has {memory:,}; use the original safetensors model, which loads piece by piece."
        )


def _load(linked: Path, metadata: Mapping[str, Any], dtype: str) -> PreTrainedModel:
    try:
        with without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                linked.parent,
                gguf_file=linked.name,
                dtype=_DTYPES[dtype],
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
    except (ValueError, KeyError, NotImplementedError, RuntimeError, AssertionError) as error:
        raise ModelError(
            f"transformers cannot load {linked.name} (architecture "
            f"{metadata['general.architecture']!r}) from GGUF: {error}; "
            "use the original safetensors model."
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{linked.name} lacks {len(missing)} tensors of its architecture, first {missing[0]}; "
            "it is incomplete: fetch it again, or use the original safetensors model."
        )
    assert isinstance(model, PreTrainedModel)
    return model


def _require_fitting_shapes(path: Path, model: PreTrainedModel) -> None:
    """Refuse tensors whose shapes contradict the config, which GGUF loading takes as they come:
    the folder could not be loaded again.
    """
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(model.config).state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"{path.name} has {name} of shape {tuple(tensor.shape)}, but by the settings that "
                f"transformers reads from the file it would be {tuple(expected[name].shape)}; "
                "use the original safetensors model."
            )


def _require_all_used(path: Path, reader: gguf.GGUFReader, model: PreTrainedModel) -> None:
    """Refuse a file with weights that transformers has no place for and would silently drop.

    A tied head that the file holds all the same, and layers past the model's last (for
    multi-token prediction), may be dropped.
    """
    num_layers = model.config.num_hidden_layers
    tied = model.config.tie_word_embeddings
    expected = 0
    for tensor in reader.tensors:
        block = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else "0"
        unused = tensor.name.startswith(_SETTING_TENSORS) or int(block) >= num_layers
        if not unused and not (tied and tensor.name == "output.weight"):
            expected += int(tensor.n_elements)
    held = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    got = sum(held.values())
    if got < expected:
        raise ModelError(
            f"transformers takes only {got:,} of the {expected:,} weights in {path.name} "
            f"(architecture {model.config.model_type!r}) and would drop the rest; "
            "use the original safetensors model."
        )


def _require_finite(path: Path, model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"{path.name} has values in {name} that are not finite in {parameter.dtype}; "
                "the file is damaged, or made by a broken conversion: fetch another."
            )


def _set_token_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    metadata: Mapping[str, Any],
) -> None:
    """Let config and generation config name the tokenizer's special tokens, and every token that
    ends a turn.
    """
    stated = model.config.eos_token_id
    ends = {*stated} if isinstance(stated, list) else {stated}
    ends |= {tokenizer.eos_token_id, metadata.get("tokenizer.ggml.eot_token_id")}
    eos = sorted(index for index in ends if index is not None)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    for key, value in ids.items():
        setattr(model.config, key, value)
    model.generation_config = GenerationConfig(**ids)
