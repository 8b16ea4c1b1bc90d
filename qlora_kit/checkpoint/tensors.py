"""Tensors, and nested values that hold many of them, as the bytes of files.

The files are safetensors files, and any library can read them; reading one runs no code, as
unpickling would. The bytes are copies, so that training may go on while they are written. An
optimizer's state is thousands of tensors of a few kilobytes, for which `torch.save` takes several
times as long as the disk: `value_parts` joins those of one dtype end to end, and keeps the
structure around them in the file's metadata. Where training waits until they are written
(`is_copied=False`), large tensors on the CPU are their own bytes, and take no memory twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qlora_kit.checkpoint.draft import Buffer

STRUCTURE = "structure"
_PART_BYTES = 1 << 25
_FEWEST_UNCOPIED = 1 << 20
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


def tensor_parts(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    is_copied: bool = True,
) -> list[Buffer]:
    """A safetensors file, part by part; the tensors may be on any device.

    Args:
        is_copied: False where none of them changes before the parts are written.

    Raises:
        TypeError: a dtype that no checkpoint has.
    """
    whole = {name: (list(one.shape), [one]) for name, one in tensors.items()}
    return _parts(whole, dict(metadata or {}), is_copied)


def value_parts(values: Any, is_copied: bool = True) -> list[Buffer]:
    """The same of dicts, lists, tuples, numbers, texts, None and strided tensors, nested at will.

    Tensors come back on the CPU and contiguous, one that stands in several places as one.

    Raises:
        TypeError: a value of another type.
    """
    packer = _Packer()
    structure = json.dumps(packer.encode(values))
    joined = {name: ([row.length], row.parts) for name, row in packer.rows.items()}
    return _parts(joined, {STRUCTURE: structure}, is_copied)


def load_values(path: Path) -> Any:
    """What `value_parts` was given, to the bit."""
    with safe_open(path, framework="pt") as file:
        structure = json.loads(file.metadata()[STRUCTURE])
        joined = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return _Unpacker(joined).decode(structure)


def _parts(
    entries: dict[str, tuple[list[int], list[torch.Tensor]]],
    metadata: dict[str, str],
    is_copied: bool,
) -> list[Buffer]:
    """Each entry is a shape, and the tensors that one after the other make it up."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    # The widest dtype first, so that every tensor is aligned.
    order = sorted(entries, key=lambda name: (-entries[name][1][0].element_size(), name))
    end = 0
    for name in order:
        shape, parts = entries[name]
        dtype = parts[0].dtype
        if dtype not in _DTYPES:
            raise TypeError(f"{name}: a tensor of {dtype} cannot be written")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    tensors = [part for name in order for part in entries[name][1]]
    return [len(text).to_bytes(8, "little") + text, *map(_bytes_of, _joined(tensors, is_copied))]


def _joined(tensors: list[torch.Tensor], is_copied: bool) -> Iterator[torch.Tensor]:
    """Copies on the CPU of neighbours of a dtype, end to end; large ones that need not be copied
    by themselves.
    """
    group: list[torch.Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        if not is_copied and _is_there(tensor):
            if group:
                yield _copy_of(group)
                group, num_bytes = [], 0
            yield tensor.detach().reshape(-1)
            continue
        is_alike = not group or (tensor.dtype, tensor.device) == (group[0].dtype, group[0].device)
        if group and (not is_alike or num_bytes + tensor.nbytes > _PART_BYTES):
            yield _copy_of(group)
            group, num_bytes = [], 0
        group.append(tensor.detach().reshape(-1))
        num_bytes += tensor.nbytes
    if group:
        yield _copy_of(group)


def _is_there(tensor: torch.Tensor) -> bool:
    """Whether it is written from where it lies, which of bitsandbytes' paged ones may be a GPU."""
    is_paged = getattr(tensor, "is_paged", False)
    return tensor.device.type == "cpu" and tensor.nbytes >= _FEWEST_UNCOPIED and not is_paged


def _copy_of(group: list[torch.Tensor]) -> torch.Tensor:
    """On its own device first, which for a GPU is one transfer instead of thousands."""
    if len(group) == 1 and group[0].device.type != "cpu":
        return group[0].cpu()  # a copy already, and none on a GPU that may be full
    return torch.cat(group).cpu()


def _bytes_of(flat: torch.Tensor) -> memoryview:
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


class _Packer:
    """Tensors by dtype, and where in the row of its dtype each of them stands."""

    def __init__(self) -> None:
        self.rows: dict[str, _Row] = {}
        self._row_of: dict[torch.dtype, _Row] = {}
        self._known: dict[int, list[Any]] = {}

    def encode(self, value: Any) -> Any:
        """JSON in which a list is `["kind", ...]`, and so never mistaken for anything else."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, torch.Tensor):
            place = self._known.get(id(value))
            return self._place_of(value) if place is None else place
        if isinstance(value, dict):
            pairs = [[self.encode(key), self.encode(item)] for key, item in value.items()]
            return ["dict", *pairs]
        if kind in (list, tuple):
            return [kind.__name__, *map(self.encode, value)]
        raise TypeError(f"a {kind.__name__} cannot be written: {value!r}")

    def _place_of(self, tensor: torch.Tensor) -> list[Any]:
        dtype = tensor.dtype
        row = self._row_of.get(dtype)
        if row is None:
            row = self._row_of[dtype] = _Row(str(dtype).removeprefix("torch."))
            self.rows[row.name] = row
        shape = list(tensor.shape)
        place = ["tensor", row.name, row.length, shape]
        row.length += math.prod(shape)
        row.parts.append(tensor)
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
