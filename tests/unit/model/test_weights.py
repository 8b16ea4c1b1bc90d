"""Weight files by their headers: whole ones are read, broken ones named."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qlora_kit.errors import ModelError
from qlora_kit.model.weights import TensorInfo, inspect_weights, read_header

TENSORS = {
    "embed.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "norm.weight": np.ones(3, dtype=np.float16),
    "empty": np.zeros((0, 3), dtype=np.int8),
}


def save(folder: Path, shards: dict[str, list[str]], index: str | None = None) -> Path:
    for name, tensors in shards.items():
        save_file({tensor: TENSORS[tensor] for tensor in tensors}, folder / name, {"format": "pt"})
    if index:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save(tmp_path, {"model.safetensors": list(TENSORS)})


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    shards = {
        "model-00001-of-00002.safetensors": ["embed.weight"],
        "model-00002-of-00002.safetensors": ["norm.weight", "empty"],
    }
    return save(tmp_path, shards, "model.safetensors.index.json")


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        inspect_weights(folder)
    return str(caught.value)


def test_a_single_file(single: Path) -> None:
    weights = inspect_weights(single)
    path = single / "model.safetensors"
    assert weights.format == "safetensors"
    assert weights.files == (path,)
    assert weights.tensors == {
        "embed.weight": TensorInfo("F32", (4, 3), path),
        "norm.weight": TensorInfo("F16", (3,), path),
        "empty": TensorInfo("I8", (0, 3), path),
    }
    assert weights.tensors["embed.weight"].num_elements == 12
    assert weights.total_bytes == sum(tensor.nbytes for tensor in TENSORS.values()) == 54


def test_shards(sharded: Path) -> None:
    weights = inspect_weights(sharded)
    assert [path.name for path in weights.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert set(weights.tensors) == set(TENSORS)
    assert weights.tensors["norm.weight"].file == weights.files[1]
    assert weights.total_bytes == 54


def test_each_truncation_is_noticed(single: Path) -> None:
    """The safetensors library must refuse the same files."""
    path = single / "model.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        message = refused(single)
        assert str(path) in message
        assert "truncated" in message or length < 8
        with pytest.raises(SafetensorError):
            load_file(path)


def test_surplus_bytes_are_noticed(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert "1 bytes more" in refused(single)


def test_an_empty_file(single: Path) -> None:
    (single / "model.safetensors").write_bytes(b"")
    assert "is empty" in refused(single)


def test_a_git_lfs_pointer(single: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (single / "model.safetensors").write_text(pointer)
    assert "git lfs pull" in refused(single)


def test_a_web_page_saved_as_weights(single: Path) -> None:
    (single / "model.safetensors").write_text("<!doctype html><html><body>404</body></html>")
    assert "is not a safetensors file" in refused(single)


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("header", "piece"),
    [
        (b"not json", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no mapping"),
        ({"a": 5}, "garbles a"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "garbles a"),
        ({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, "garbles a"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "F32 of shape [2]"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "overlap"),
        (
            {
                "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
            },
            "overlap",
        ),
    ],
)
def test_a_header_that_makes_no_sense(header: object, piece: str, tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", header, b"\0" * 4)
    message = refused(tmp_path)
    assert piece in message
    assert "model.safetensors" in message


def test_a_file_without_tensors(tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}})
    assert "holds no tensors" in refused(tmp_path)


def test_a_dtype_of_the_future_is_taken_by_its_offsets(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F2", "shape": [16], "data_offsets": [0, 4]}}
    write_header(tmp_path / "x.safetensors", header, b"\0" * 4)
    assert read_header(tmp_path / "x.safetensors")["a"].dtype == "F2"


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors of the 2 files" in refused(sharded)


def test_a_truncated_shard(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    message = refused(sharded)
    assert shard.name in message
    assert "truncated" in message


def test_shards_of_another_model(sharded: Path) -> None:
    save(sharded, {"model-00001-of-00002.safetensors": ["norm.weight"]})
    assert "norm.weight" in refused(sharded)
    save(sharded, {"model-00002-of-00002.safetensors": ["empty"]})
    assert "holds embed.weight, and it does not" in refused(sharded)


@pytest.mark.parametrize(
    ("content", "piece"),
    [
        ("{", "is not JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "no file name in its folder"),
        ('{"weight_map": {"a": 5}}', "no file name in its folder"),
    ],
)
def test_a_bad_index(content: str, piece: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    assert piece in refused(sharded)


def test_no_weights(tmp_path: Path) -> None:
    assert "holds no weights" in refused(tmp_path)


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors nor" in refused(sharded)


def test_pickles_are_named_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    weights = inspect_weights(tmp_path)
    assert weights.format == "pickle"
    assert weights.tensors == {}
    assert weights.total_bytes == 11


def test_safetensors_go_before_pickles(single: Path) -> None:
    (single / "pytorch_model.bin").write_bytes(b"x")
    assert inspect_weights(single).format == "safetensors"
