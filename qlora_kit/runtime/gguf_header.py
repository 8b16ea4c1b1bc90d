"""What the header of a GGUF file says of its weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError

# Tensors that hold no weights but settings of the position encoding.
_SETTINGS = ("rope_freqs.", "rope_factors_")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufHeader:
    """The header of a model, of all its parts where it is split over files.

    `parameters` counts weights by the name of their ggml type, `weight_bytes` what they take with
    all their scales.
    """

    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    parameters: Mapping[str, int]
    tensor_types: Mapping[str, str]
    weight_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def kind(self) -> str:
        """`model`, or `adapter`."""
        return str(self.metadata.get("general.type", "model"))

    @property
    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def read_header(path: Path) -> GgufHeader:
    """Without reading the weights.

    Raises:
        ModelError: there is no GGUF file at `path`, or it is damaged.
    """
    files = _parts(path)
    parameters: Counter[str] = Counter()
    tensor_types: dict[str, str] = {}
    weight_bytes = 0
    metadata: dict[str, Any] = {}
    for file in files:
        reader = _open(file)
        metadata = {key: field.contents() for key, field in reader.fields.items()} | metadata
        for tensor in reader.tensors:
            if tensor.name.startswith(_SETTINGS):
                continue
            name = tensor.tensor_type.name
            tensor_types[tensor.name] = name
            parameters[name] += int(tensor.n_elements)
            weight_bytes += int(tensor.n_bytes)
    return GgufHeader(files, metadata, dict(parameters), tensor_types, weight_bytes)


def _parts(path: Path) -> tuple[Path, ...]:
    """All files of a model that was split, of which the first is named."""
    found = _SPLIT.search(path.name)
    if found is None:
        return (path,)
    stem, count = path.name[: found.start()], int(found[2])
    names = [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    return tuple(path.with_name(name) for name in names)


def _open(path: Path) -> Any:
    import gguf

    if not path.is_file():
        raise ModelError(f"there is no GGUF file at {path}.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'.")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelError(
            f"{path} is truncated or damaged ({error}); its size is {path.stat().st_size:,} bytes."
        ) from error
