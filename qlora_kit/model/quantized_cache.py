"""Quantized bases kept on the disk, so that the next start reads 4 bits and quantizes nothing.

An entry's name is made of everything that decides the numbers, so that whoever asks for the same
finds it: the next start, another verb, the other processes of a launch. It is taken only where each
of its files has the SHA-256 that it was written with, and the model read from it the checksum of
the one that was quantized. What nobody has used for longest goes when room is needed, and what
nobody has used for a month.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from qlora_kit.atomic import ANOTHER_CACHE, published_folder, require_disk
from qlora_kit.environment import available_cpus, cache_dir, quantized_cache_bytes
from qlora_kit.errors import HardwareError, ModelError
from qlora_kit.model.shared import state_checksum
from qlora_kit.records import (
    DamagedRecordError,
    FileRecord,
    file_fault,
    file_record,
    files_as_json,
    files_from_json,
    read_sealed,
    sealed_bytes,
)
from qlora_kit.refusals import said_by_the_disk
from qlora_kit.versions import package_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = 2
_RECORD_FILE = "entry.json"
_STAMP = "used"
_UNUSED_SECONDS = 30 * 24 * 3600
_OTHER_FILES_BYTES = 32 * 1024**2
_DECIDING = ("torch", "transformers", "bitsandbytes")
# Several files are hashed side by side.
_SHARD_BYTES = 512 * 1024**2
# An entry that nobody waits for must leave room for what the run will write, a merged model too.
_TIMES_FREE = 5
_CANNOT_BE_SAVED = (RuntimeError, ValueError, NotImplementedError)

ANEW = "quantized anew"
KEPT = "quantized anew and kept for the next start"
_OF_A_PLACE = ("_name_or_path", "transformers_version")
READ = "quantized before: read from the cache, verified"

Load = Callable[[Path | None], "PreTrainedModel"]
"""From the given folder, or from the base itself."""


def entry_folder(
    fingerprint: str,
    config: dict[str, Any],
    dtype: torch.dtype,
    device: str,
    model_config: dict[str, Any],
) -> Path:
    """Where a base with this fingerprint is kept, quantized as `config` says (bitsandbytes').

    A GPU may round otherwise than a CPU, so the device counts. So does what the model is configured
    to be, which an entry holds beside the weights: the same weights may be given another dropout or
    another scaling of their positions.
    """
    versions = package_versions()
    facts = {
        "format": _FORMAT,
        "base": fingerprint,
        "quantization": config,
        "model": {name: one for name, one in model_config.items() if name not in _OF_A_PLACE},
        "dtype": str(dtype),
        "device": device,
        "versions": {name: versions[name] for name in _DECIDING},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_dir() / "quantized" / digest[:32]


def load_for_all(
    entry: Path, load: Load, warn: Callable[[str], None]
) -> tuple[PreTrainedModel, str]:
    """What is in `entry`, or else what is loaded anew and left there for other processes.

    Returns the model, and how it was come by.

    Raises:
        HardwareError: there is no room for it.
    """
    model = _read(entry, load, warn)
    if model is not None:
        return model, READ
    model = load(None)
    needed = _bytes_of(model)
    require_disk(entry, needed, "the quantized base", ANOTHER_CACHE)
    _make_room(entry, needed)
    _write(entry, model)
    return model, KEPT


def load_kept(entry: Path, load: Load, warn: Callable[[str], None]) -> tuple[PreTrainedModel, str]:
    """The same for the next start: where it cannot be kept, that is said, and no fault."""
    limit_bytes = quantized_cache_bytes()
    if limit_bytes == 0:
        return load(None), ANEW
    model = _read(entry, load, warn)
    if model is not None:
        return model, READ
    model = load(None)
    needed = _bytes_of(model)
    why = _why_not(entry, needed, limit_bytes)
    if why is None:
        _make_room(entry, needed)
        try:
            _write(entry, model)
        except (OSError, SafetensorError) as error:
            why = said_by_the_disk(error) or str(error)
        except HardwareError as error:
            why = str(error)
        except _CANNOT_BE_SAVED as error:
            why = f"transformers cannot save it ({type(error).__name__})"
    if why is None:
        return model, KEPT
    warn(f"the quantized base is not kept for the next start: {why.rstrip('.')}.")
    return model, ANEW


def _bytes_of(model: PreTrainedModel) -> int:
    """Of its files, at most; tied weights are written once."""
    sizes: dict[int, int] = {
        one.data_ptr(): one.numel() * one.element_size() for one in model.state_dict().values()
    }
    return sum(sizes.values()) + _OTHER_FILES_BYTES


def _why_not(entry: Path, needed_bytes: int, limit_bytes: int) -> str | None:
    """What speaks against keeping an entry that nobody waits for."""
    if needed_bytes > limit_bytes:
        return (
            f"it takes {needed_bytes:,} bytes, and QLORA_KIT_QUANTIZED_GIB allows {limit_bytes:,}"
        )
    try:
        require_disk(entry, _TIMES_FREE * needed_bytes, "it beside the run", ANOTHER_CACHE)
    except HardwareError as error:
        return str(error)
    return None


def _write(entry: Path, model: PreTrainedModel) -> None:
    """Publish an entry; the model is as before."""
    dtype = model.config.dtype
    try:
        with published_folder(entry) as draft:
            model.save_pretrained(draft, max_shard_size=_SHARD_BYTES)
            files = {path.name: path for path in sorted(draft.iterdir())}
            values = {
                "format": _FORMAT,
                "checksum": state_checksum(model),
                "files": files_as_json(dict(zip(files, _hashed(files.values()), strict=True))),
            }
            (draft / _RECORD_FILE).write_bytes(sealed_bytes(values))
    finally:
        model.config.dtype = dtype  # which saving turns into a text
    _stamp(entry)


def _hashed(paths: Any) -> list[FileRecord]:
    with ThreadPoolExecutor(max(available_cpus(), 1)) as pool:
        return list(pool.map(file_record, paths))


def _read(entry: Path, load: Load, warn: Callable[[str], None]) -> PreTrainedModel | None:
    """None where there is none, or it is not what was written, which is told."""
    if not entry.is_dir():
        return None
    try:
        checksum = _verified(entry)
        model = load(entry)
        if state_checksum(model) != checksum:
            raise DamagedRecordError("it is read otherwise than it was written")
    except (OSError, SafetensorError, ModelError, DamagedRecordError) as error:
        warn(f"the quantized base in the cache is damaged ({error}); it is quantized anew.")
        shutil.rmtree(entry, ignore_errors=True)
        return None
    _stamp(entry)
    return model


def _verified(entry: Path) -> str:
    """The checksum of the model in an entry whose files are those that were written.

    Raises:
        DamagedRecordError: names a file that is not.
    """
    values = read_sealed(entry / _RECORD_FILE, _FORMAT)
    files = files_from_json(values["files"])
    with ThreadPoolExecutor(max(available_cpus(), 1)) as pool:
        faults = pool.map(lambda name: file_fault(entry / name, files[name]), files)
        for name, fault in zip(files, faults, strict=True):
            if fault:
                raise DamagedRecordError(f"{name} {fault}")
    return str(values["checksum"])


@dataclass(frozen=True)
class _Entry:
    folder: Path
    last_used: float
    num_bytes: int


def _entries(parent: Path) -> Iterator[_Entry]:
    """Whole ones; another process may be sweeping, too."""
    for folder in parent.iterdir():
        if folder.name.startswith("."):
            continue
        with suppress(OSError):
            yield _Entry(
                folder,
                (folder / _STAMP).stat().st_mtime,
                sum(one.stat().st_size for one in folder.iterdir()),
            )


def _make_room(entry: Path, needed_bytes: int) -> None:
    """Remove those that nobody has used for longest until one of so many bytes is within the
    limit.
    """
    if not entry.parent.is_dir():
        return
    others = sorted(_entries(entry.parent), key=lambda one: one.last_used)
    excess = sum(one.num_bytes for one in others) + needed_bytes - quantized_cache_bytes()
    for other in others:
        if excess <= 0:
            return
        shutil.rmtree(other.folder, ignore_errors=True)
        excess -= other.num_bytes


def _stamp(entry: Path) -> None:
    """Say that it is of use still, and remove those that none was for a month."""
    with suppress(OSError):  # a cache that is only read from is of use as well
        (entry / _STAMP).touch()
        for other in _entries(entry.parent):
            if time.time() - other.last_used > _UNUSED_SECONDS:
                shutil.rmtree(other.folder, ignore_errors=True)
