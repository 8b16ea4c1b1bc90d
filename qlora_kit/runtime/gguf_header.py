"""What the header of a GGUF file says: its settings, and of its weights type and size.

The gguf library's reader takes a minute for a large vocabulary, as it makes an array of every
token; here the header is read as the few kinds of fields that it consists of.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError

# Tensors that hold no weights but settings of the position encoding.
_SETTINGS = ("rope_freqs.", "rope_factors_")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_VERSIONS = (2, 3)

# Kinds of values by number; 8 is a text, 9 a list.
_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _LIST = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: the name of its ggml type, its weights, and what they take."""

    name: str
    type: str
    shape: tuple[int, ...]
    """As it is stored, the length of a row first."""
    num_bytes: int

    @property
    def num_weights(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """The header of a model, of all its parts where it is split over files."""

    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def kind(self) -> str:
        """`model`, or `adapter`."""
        return str(self.metadata.get("general.type", "model"))

    @property
    def parameters(self) -> dict[str, int]:
        """Weights by the name of their ggml type."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.type] += tensor.num_weights
        return dict(counts)

    @property
    def weight_bytes(self) -> int:
        """What the weights take with all their scales."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def read_header(path: Path) -> GgufHeader:
    """Without reading the weights.

    Raises:
        ModelError: there is no GGUF file at `path`, or it is damaged.
    """
    files = _parts(path)
    metadata: dict[str, Any] = {}
    tensors: list[TensorInfo] = []
    for file in files:
        own, found = _read(file)
        metadata = own | metadata
        tensors += found
    return GgufHeader(files, metadata, tuple(tensors))


def _parts(path: Path) -> tuple[Path, ...]:
    """All files of a model that was split, of which the first is named."""
    found = _SPLIT.search(path.name)
    if found is None:
        return (path,)
    stem, count = path.name[: found.start()], int(found[2])
    names = [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    return tuple(path.with_name(name) for name in names)


def _read(path: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    if not path.is_file():
        raise ModelError(f"there is no GGUF file at {path}.")
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Cursor(data).header()
            except (struct.error, IndexError, KeyError, ValueError) as error:
                raise ModelError(
                    f"{path} is truncated or damaged ({error!r}); its size is "
                    f"{path.stat().st_size:,} bytes."
                ) from error


class _Cursor:
    """Reads one field after the other."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 4

    def header(self) -> tuple[dict[str, Any], list[TensorInfo]]:
        version = self.number("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}")
        num_tensors, num_fields = self.number("Q"), self.number("Q")
        metadata = {self.text(): self.value(self.number("I")) for _ in range(num_fields)}
        return metadata, self.tensors(num_tensors)

    def tensors(self, count: int) -> list[TensorInfo]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        found = []
        for _ in range(count):
            name = self.text()
            shape = tuple(self.number("Q") for _ in range(self.number("I")))
            kind = GGMLQuantizationType(self.number("I"))
            self.number("Q")  # where its data begins
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if not name.startswith(_SETTINGS):
                size = prod(shape) // block * block_bytes
                found.append(TensorInfo(name, kind.name, shape, size))
        return found

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        if self.at + length > len(self.data):
            raise ValueError("a text longer than the file")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            return self.number(_FORMATS[kind])
        of, count = self.number("I"), self.number("Q")
        if of in (_TEXT, _LIST):
            return [self.value(of) for _ in range(count)]
        form = f"<{count}{_FORMATS[of]}"
        values = list(struct.unpack_from(form, self.data, self.at))
        self.at += struct.calcsize(form)
        return values
