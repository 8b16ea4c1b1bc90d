"""Shards that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_kit.errors import HardwareError
from qlora_kit.export.shards import ShardWriter, require_room


def write(folder: Path, limit: int) -> dict[str, torch.Tensor]:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    writer = ShardWriter(folder, limit)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    assert writer.num_bytes == 200
    return tensors


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    tensors = write(tmp_path, 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("limit", "count"), [(80, 3), (1, 5), (199, 2)])
def test_shards_hold_no_more_than_the_limit_and_are_indexed(
    tmp_path: Path, limit: int, count: int
) -> None:
    tensors = write(tmp_path, limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert set(index["weight_map"]) == set(tensors)
    for name, file_name in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file_name)[name], tensors[name])


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 1000)
    matrix = torch.arange(6.0).view(2, 3)
    writer.add("turned", matrix.T)
    writer.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["turned"], matrix.T)


def test_a_full_disk_is_refused_before_the_work(tmp_path: Path) -> None:
    require_room(tmp_path / "not" / "there", 1)
    with pytest.raises(HardwareError, match=r"takes 1,000,000,000,000,000,000 bytes"):
        require_room(tmp_path / "out", 10**18)
