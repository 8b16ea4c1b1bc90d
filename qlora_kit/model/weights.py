"""What a model folder's weight files hold, read from their headers alone. No torch.

A safetensors file begins with 8 bytes (little-endian length N of the header), then N bytes of
JSON (name → dtype, shape, data_offsets), then the data
(https://github.com/huggingface/safetensors#format). So its length is known without reading it,
and a shard whose download broke off is found in milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_kit.errors import ModelError
from qlora_kit.model.json_file import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_LENGTH_BYTES = 8
_LFS_POINTER = b"version https://git-lfs"

_DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a header describes it."""

    dtype: str
    """In safetensors' spelling: `BF16`, `F32`, `U8` …"""
    shape: tuple[int, ...]
    file: Path

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightFiles:
    """The files that loading a model folder reads."""

    format: Literal["safetensors", "pickle"]
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    """By name; empty for pickles, which cannot be looked into without running them."""
    total_bytes: int
    """Of all tensors; of the files, for pickles."""


def inspect_weights(folder: Path) -> WeightFiles:
    """The weights of a model folder, found in the order in which transformers looks for them.

    Raises:
        ModelError: there are none, or a file is missing, truncated or damaged; names the file.
    """
    if (folder / SINGLE_FILE).is_file():
        return _safetensors([folder / SINGLE_FILE])
    if (folder / INDEX_FILE).is_file():
        shard_of = read_index(folder / INDEX_FILE)
        weights = _safetensors(_all_present(folder, shard_of))
        _require_indexed(folder / INDEX_FILE, shard_of, weights)
        return weights
    if (folder / PICKLE_FILE).is_file():
        return _pickles([folder / PICKLE_FILE])
    if (folder / PICKLE_INDEX_FILE).is_file():
        return _pickles(_all_present(folder, read_index(folder / PICKLE_INDEX_FILE)))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise ModelError(
            f"{folder} holds {others[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}, so it is not "
            "known which files make up the model; get the missing one as well."
        )
    raise ModelError(f"{folder} holds no weights: no {SINGLE_FILE} and no {INDEX_FILE}.")


def weight_files(folder: Path, allow_pickle: bool = False) -> tuple[Path, ...]:
    """The files that loading a model folder reads; raises as `readable_weights` does."""
    return readable_weights(folder, allow_pickle).files


def readable_weights(folder: Path, allow_pickle: bool = False) -> WeightFiles:
    """The weights of a model folder, where they may be read.

    Raises:
        ModelError: there are none, one is damaged, or they are pickles and those are not allowed.
    """
    weights = inspect_weights(folder)
    if weights.format == "pickle" and not allow_pickle:
        raise ModelError(
            f"{folder} holds its weights as pickles ({weights.files[0].name}), which can run code "
            "when they are read. Convert them to safetensors, or set model.allow_pickle: true."
        )
    return weights


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of the file's header.

    Raises:
        ModelError: it cannot be read, is truncated, or is no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
            _refuse_pointer(path, start)
            length = int.from_bytes(start[:_LENGTH_BYTES], "little")
            if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise _not_safetensors(path, size, length)
            file.seek(_LENGTH_BYTES)
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not a safetensors file: its header is not JSON.") from None
    tensors, data_bytes = _tensors(path, header)
    expected = _LENGTH_BYTES + length + data_bytes
    if size < expected:
        raise ModelError(
            f"{path} is truncated: it has {size:,} bytes, and its header announces {expected:,}; "
            "fetch it again."
        )
    if size > expected:
        raise ModelError(
            f"{path} is damaged: it has {size - expected:,} bytes more than its header announces; "
            "fetch it again."
        )
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """An index's `weight_map`: the file that holds each tensor.

    Raises:
        ModelError: it cannot be read, or names files outside its folder.
    """
    content = read_json(path)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise ModelError(f"{path} has no weight_map, so it does not say where the tensors are.")
    for name in shard_of.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{path} names {name!r}, which is no file name in its folder.")
    return shard_of


def _safetensors(files: list[Path]) -> WeightFiles:
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for name, info in read_header(path).items():
            if name in tensors:
                raise ModelError(f"{path} holds {name}, and so does {tensors[name].file.name}.")
            tensors[name] = info
    if not tensors:
        raise ModelError(f"{files[0]} holds no tensors.")
    total = sum(_num_bytes(info.dtype, info.shape) or 0 for info in tensors.values())
    return WeightFiles("safetensors", tuple(files), tensors, total)


def _pickles(files: list[Path]) -> WeightFiles:
    for path in files:
        with path.open("rb") as file:
            _refuse_pointer(path, file.read(len(_LFS_POINTER)))
    return WeightFiles("pickle", tuple(files), {}, sum(path.stat().st_size for path in files))


def _all_present(folder: Path, shard_of: Mapping[str, str]) -> list[Path]:
    names = sorted(set(shard_of.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{folder} lacks {missing[0]}{more} of the {len(names)} files that its index names; "
            "the download is incomplete."
        )
    return [folder / name for name in names]


def _require_indexed(index: Path, shard_of: Mapping[str, str], weights: WeightFiles) -> None:
    """Every tensor of the index is in the file it names."""
    for name, file_name in shard_of.items():
        info = weights.tensors.get(name)
        if info is None or info.file.name != file_name:
            raise ModelError(f"{index} says that {file_name} holds {name}, and it does not.")


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start == _LFS_POINTER:
        raise ModelError(
            f"{path} is a Git LFS pointer and not the file itself; run `git lfs pull` there."
        )


def _not_safetensors(path: Path, size: int, length: int) -> ModelError:
    if size == 0:
        return ModelError(f"{path} is empty; fetch it again.")
    if length <= _MAX_HEADER_BYTES and size >= _LENGTH_BYTES:
        return ModelError(
            f"{path} is truncated: its header has {length:,} bytes, and the file {size:,}; "
            "fetch it again."
        )
    return ModelError(f"{path} is not a safetensors file.")


def _tensors(path: Path, header: Any) -> tuple[dict[str, TensorInfo], int]:
    """The tensors, and the bytes of data they fill."""
    if not isinstance(header, dict):
        raise ModelError(f"{path} is not a safetensors file: its header is no mapping.")
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype = str(entry["dtype"])
            shape = tuple(int(size) for size in entry["shape"])
            begin, end = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise ModelError(f"{path} is damaged: its header garbles {name}.") from None
        if _num_bytes(dtype, shape) not in (None, end - begin):
            raise ModelError(
                f"{path} is damaged: {name} has {end - begin:,} bytes, which is not what "
                f"{dtype} of shape {list(shape)} takes."
            )
        tensors[name] = TensorInfo(dtype, shape, path)
        spans.append((begin, end))
    filled = 0
    for begin, end in sorted(spans):
        if begin != filled:
            raise ModelError(f"{path} is damaged: its tensors overlap or leave a gap.")
        filled = end
    return tensors, filled


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """None for a dtype that this version does not know."""
    bits = _DTYPE_BITS.get(dtype)
    return None if bits is None else -(-bits * math.prod(shape) // 8)
