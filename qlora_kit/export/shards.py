"""Write tensors into safetensors shards, one at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from qlora_kit.errors import HardwareError

# Tokenizer and configs, generously.
SURROUNDINGS_BYTES = 64 * 2**20

_INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors up to `max_shard_bytes`, writes a shard, forgets them.

    A tensor larger than that gets a shard of its own.
    """

    def __init__(self, folder: Path, max_shard_bytes: int):
        self.folder = folder
        self.num_bytes = 0
        self._limit = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        assert name not in self._pending
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.num_bytes += size

    def close(self) -> None:
        """Write what is pending, give the shards their names, and write the index."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._scratch(1).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            file_name = f"model-{number:05}-of-{count:05}.safetensors"
            self._scratch(number).rename(self.folder / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        index = {
            "metadata": {"total_size": self.num_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (self.folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        path = self._scratch(len(self._shards) + 1)
        save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending = {}
        self._pending_bytes = 0

    def _scratch(self, number: int) -> Path:
        return self.folder / f"shard-{number:05}.safetensors"


def require_room(out: Path, needed_bytes: int) -> None:
    """Make sure that `needed_bytes` fit onto the disk of `out`, which need not exist yet.

    Raises:
        HardwareError: they do not.
    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes + SURROUNDINGS_BYTES:
        raise HardwareError(
            f"no room for {out}: it takes {needed_bytes:,} bytes and up to {SURROUNDINGS_BYTES:,} "
            f"for what stands beside them, and {free_bytes:,} are free in {place}; make room, or "
            "name a folder on another disk."
        )
