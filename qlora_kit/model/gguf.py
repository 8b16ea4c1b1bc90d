"""GGUF files as plain model folders: weights in safetensors, with a correct tokenizer.

A GGUF file cannot be trained on as it is (transformers refuses to, and to quantize it again), so
it is dequantized once into a folder that any tool reads, and kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig, PreTrainedModel

from qlora_kit.environment import cache_dir
from qlora_kit.errors import HardwareError, ModelError
from qlora_kit.model.gguf_tokenizer import build_tokenizer

logger = logging.getLogger(__name__)

CONVERSION_VERSION = 1
"""Raised when converted folders change, so that folders of an older version are not taken."""

RECORD_NAME = "conversion.json"

_LEFTOVER_SECONDS = 24 * 3600
_TOKENIZER_BYTES = 32 * 2**20
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class GgufConversion:
    """What was converted, and what could not be made sure of; kept in the folder as JSON."""

    source: str
    source_sha256: str
    architecture: str
    dtype: str
    version: int
    warnings: tuple[str, ...]


def convert_cached(gguf_path: Path, *, dtype: str = "float32") -> Path:
    """The model folder for a GGUF file, converted on first use into the user's cache.

    The folder's name starts with the file's SHA-256, so a file changed in place is a new model.

    Raises:
        ModelError, HardwareError: as `gguf_to_folder`.
    """
    _require_gguf(gguf_path)
    digest = sha256_of(gguf_path)
    name = f"{digest[:16]}-{gguf_path.stem}-{dtype}-v{CONVERSION_VERSION}"
    return gguf_to_folder(gguf_path, cache_dir() / "gguf" / name, dtype=dtype, sha256=digest)


def gguf_to_folder(
    gguf_path: Path, folder: Path, *, dtype: str = "float32", sha256: str | None = None
) -> Path:
    """Dequantize a GGUF file into `folder`, unless that already holds a conversion.

    float32 is the default because every GGUF block type dequantizes into it exactly, while 16
    bits would round a second time. It costs 4 bytes of disk per parameter.

    Args:
        sha256: the file's digest where the caller has it already.

    Raises:
        ModelError: no readable GGUF file, or an architecture that transformers cannot load.
        HardwareError: not enough room on the disk.
    """
    if folder.exists():
        return _existing(folder)
    reader = _open(gguf_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    num_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    needed = num_weights * _DTYPES[dtype].itemsize + _TOKENIZER_BYTES
    require_disk(folder.parent, needed, f"the weights of {gguf_path.name} in {dtype}")
    with tempfile.TemporaryDirectory() as alone:
        # Alone in a folder, so that files beside it cannot change what is made of it.
        linked = Path(alone) / gguf_path.name
        linked.symlink_to(gguf_path.resolve())
        model = _load(linked, metadata, dtype)
        tokenizer, warnings = build_tokenizer(
            linked, metadata, max_length=model.config.max_position_embeddings
        )
    _set_token_ids(model, tokenizer)
    record = GgufConversion(
        source=gguf_path.name,
        source_sha256=sha256 or sha256_of(gguf_path),
        architecture=str(metadata["general.architecture"]),
        dtype=dtype,
        version=CONVERSION_VERSION,
        warnings=tuple(warnings),
    )
    with _published(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / RECORD_NAME).write_text(json.dumps(asdict(record), indent=2) + "\n")
    return _existing(folder)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def require_disk(parent: Path, needed_bytes: int, what: str) -> None:
    """Make sure that `needed_bytes` fit beside `parent`, which need not exist yet.

    Raises:
        HardwareError: they do not fit.
    """
    place = parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise HardwareError(
            f"no room on the disk for {what}: {needed_bytes:,} bytes needed, {free:,} free in "
            f"{place}; make room, or set QLORA_KIT_CACHE to a folder on another disk."
        )


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


def _load(linked: Path, metadata: dict[str, Any], dtype: str) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            linked.parent,
            gguf_file=linked.name,
            dtype=_DTYPES[dtype],
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"{linked.name} has the architecture {metadata.get('general.architecture')!r}, which "
            f"transformers cannot load from GGUF ({error}); use the original safetensors model."
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{linked.name} lacks {len(missing)} tensors of its architecture, first {missing[0]}; "
            "use a file that holds the whole model, not one part of a split one."
        )
    return model


def _set_token_ids(model: PreTrainedModel, tokenizer: Any) -> None:
    """Let config and generation config name the tokenizer's special tokens."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "pad")}
    ids["eos_token_id"] = tokenizer.eos_token_id
    for key, value in ids.items():
        setattr(model.config, key, value)
    model.generation_config = GenerationConfig(**ids)


def _existing(folder: Path) -> Path:
    record = folder / RECORD_NAME
    if not record.is_file() or not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} exists but is no converted model (no {RECORD_NAME}); move it away."
        )
    for warning in json.loads(record.read_text())["warnings"]:
        logger.warning("%s: %s", folder.name, warning)
    return folder


@contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """A draft folder that becomes `folder` in one step when the block ends well.

    A process that dies leaves only a hidden draft, swept away a day later. Of two processes that
    finish together the first wins, and the other's draft is dropped.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep_leftovers(folder)
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.draft")
    draft.mkdir()
    try:
        yield draft
        for path in draft.iterdir():
            shutil.copymode(draft / "config.json", path)
            _fsync(path)
        _fsync(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        _fsync(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sweep_leftovers(folder: Path) -> None:
    for draft in folder.parent.glob(f".{folder.name}.*.draft"):
        if time.time() - draft.stat().st_mtime > _LEFTOVER_SECONDS:
            shutil.rmtree(draft, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
