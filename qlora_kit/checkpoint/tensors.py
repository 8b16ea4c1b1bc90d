"""Tensors, and nested values that hold many of them, written as fast as the disk takes them.

The files are safetensors files, and any library can read them; reading one runs no code, as
unpickling would. Written here, they need no copy in memory, and a disk that is full says so with
an errno. An optimizer's state is thousands of tensors of a few kilobytes, for which `torch.save`
takes several times as long as the disk: `save_values` joins those of one dtype end to end, and
keeps the structure around them in the file's metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

STRUCTURE = "structure"
_PLAIN = frozenset({type(None), bool, int, float, str})
_ALIGNMENT = 8
# https://github.com/huggingface/safetensors#format
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; the tensors may be on any device.

    Raises:
        OSError: the disk refused.
        TypeError: a dtype that no checkpoint has.
    """
    whole = {name: (list(one.shape), [one.detach()]) for name, one in tensors.items()}
    _write(whole, dict(metadata or {}), path)


def save_values(values: Any, path: Path) -> None:
    """Write dicts, lists, tuples, numbers, texts, None and strided tensors, nested at will.

    Tensors come back on the CPU and contiguous, one that stands in several places as one.

    Raises:
        OSError: the disk refused.
        TypeError: a value of another type.
    """
    packer = _Packer()
    structure = json.dumps(packer.encode(values))
    joined = {
        name: ([sum(one.numel() for one in parts)], parts) for name, parts in packer.parts.items()
    }
    _write(joined, {STRUCTURE: structure}, path)


def load_values(path: Path) -> Any:
    """What `save_values` wrote, to the bit."""
    with safe_open(path, framework="pt") as file:
        structure = json.loads(file.metadata()[STRUCTURE])
        joined = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return _Unpacker(joined).decode(structure)


def _write(
    entries: dict[str, tuple[list[int], list[torch.Tensor]]], metadata: dict[str, str], path: Path
) -> None:
    """Each entry is a shape, and the tensors that one after the other make it up."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    # The widest dtype first, so that every tensor is aligned.
    order = sorted(entries, key=lambda name: (-entries[name][1][0].element_size(), name))
    end = 0
    for name in order:
        shape, parts = entries[name]
        if parts[0].dtype not in _DTYPES:
            raise TypeError(f"{name}: a tensor of {parts[0].dtype} cannot be written")
        start, end = end, end + sum(part.numel() * part.element_size() for part in parts)
        header[name] = {
            "dtype": _DTYPES[parts[0].dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = [part.cpu().reshape(-1) for part in entries[name][1]]
            joined = torch.cat(flat) if len(flat) > 1 else flat[0]
            file.write(joined.view(torch.uint8).numpy().data)


class _Packer:
    """Tensors by dtype, and where in the row of its dtype each of them stands."""

    def __init__(self) -> None:
        self.parts: dict[str, list[torch.Tensor]] = {}
        self._rows: dict[torch.dtype, _Row] = {}
        self._known: dict[int, list[Any]] = {}

    def encode(self, value: Any) -> Any:
        """JSON in which a list is `["kind", ...]`, and so never mistaken for anything else."""
        if isinstance(value, torch.Tensor):
            place = self._known.get(id(value))
            return self._place_of(value) if place is None else place
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, dict):
            pairs = [[self.encode(key), self.encode(item)] for key, item in value.items()]
            return ["dict", *pairs]
        if kind in (list, tuple):
            return [kind.__name__, *map(self.encode, value)]
        raise TypeError(f"a {kind.__name__} cannot be written: {value!r}")

    def _place_of(self, tensor: torch.Tensor) -> list[Any]:
        row = self._rows.get(tensor.dtype)
        if row is None:
            row = self._rows[tensor.dtype] = _Row(str(tensor.dtype).removeprefix("torch."))
            self.parts[row.name] = row.parts
        place = ["tensor", row.name, row.length, list(tensor.shape)]
        row.length += tensor.numel()
        row.parts.append(tensor.detach())
        self._known[id(tensor)] = place
        return place


@dataclass
class _Row:
    """The tensors of one dtype, end to end, and how many numbers they have."""

    name: str
    length: int = 0
    parts: list[torch.Tensor] = field(default_factory=list)


class _Unpacker:
    def __init__(self, joined: dict[str, torch.Tensor]) -> None:
        self._joined = joined
        self._known: dict[tuple[Any, ...], torch.Tensor] = {}

    def decode(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, *items = value
        if kind == "tensor":
            return self._tensor_at(*items)
        if kind == "dict":
            return {self.decode(key): self.decode(item) for key, item in items}
        decoded = [self.decode(item) for item in items]
        return tuple(decoded) if kind == "tuple" else decoded

    def _tensor_at(self, name: str, start: int, shape: list[int]) -> torch.Tensor:
        """A copy with memory of its own: kernels expect it to be aligned."""
        place = (name, start, *shape)
        if place not in self._known:
            flat = self._joined[name][start : start + math.prod(shape)]
            self._known[place] = flat.clone().reshape(shape)
        return self._known[place]
