"""Files of tensors are what the safetensors library reads, and nested values come back equal."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.optim import PagedAdamW8bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_kit.checkpoint.tensors import load_values, tensor_parts, value_parts

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def equal(one: Any, other: Any) -> bool:
    """To the bit, and of the same types throughout."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return same and one.reshape(-1).contiguous().view(torch.uint8).equal(
            other.reshape(-1).view(torch.uint8)
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return len(one) == len(other) and all(equal(*pair) for pair in pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other) or (isinstance(one, float) and math.isnan(one))


def back(values: Any, folder: Path) -> Any:
    (folder / "values").write_bytes(b"".join(value_parts(values)))
    return load_values(folder / "values")


class TestTensors:
    def test_the_library_reads_what_is_written(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        tensors = {
            f"{dtype} {number}": (torch.randn(shape) * 100).to(dtype)
            for dtype in DTYPES
            for number, shape in enumerate([(3, 5), (7,), (), (0, 4)])
        }
        tensors["not contiguous"] = torch.randn(8, 6).t()
        tensors["a parameter"] = torch.nn.Parameter(torch.randn(2))
        tensors["nicht ä"] = torch.tensor([float("nan"), float("-inf"), -0.0])
        (tmp_path / "file").write_bytes(b"".join(tensor_parts(tensors, {"format": "pt"})))
        read = load_file(tmp_path / "file")
        assert read.keys() == tensors.keys()
        assert all(equal(tensors[name].detach(), read[name]) for name in tensors)
        with safe_open(tmp_path / "file", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_the_same_as_the_library_writes(self, tmp_path: Path) -> None:
        """Not to the byte (the header is JSON), but in size and order of the data."""
        tensors = {
            name: torch.randn(3, dtype=torch.float64).to(dtype)
            for name, dtype in {"b": torch.bfloat16, "a": torch.float32, "c": torch.float64}.items()
        }
        (tmp_path / "ours").write_bytes(b"".join(tensor_parts(tensors)))
        save_file(tensors, tmp_path / "theirs")
        ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
        num_bytes = 3 * (2 + 4 + 8)
        assert ours[-num_bytes:] == theirs[-num_bytes:]
        assert (len(ours) - num_bytes) % 8 == 0

    @pytest.mark.parametrize("is_copied", [True, False])
    def test_large_ones_that_do_not_change_are_not_copied(
        self, tmp_path: Path, is_copied: bool
    ) -> None:
        """The file is the same; small ones are joined in any case."""
        torch.manual_seed(0)
        large = torch.randn(600, 600)
        tensors = {"a": torch.randn(3), "b": large, "c": torch.randn(4), "d": large.t()}
        parts = tensor_parts(tensors, is_copied=is_copied)
        (tmp_path / "file").write_bytes(b"".join(parts))
        read = load_file(tmp_path / "file")
        assert all(equal(tensors[name], read[name]) for name in tensors)
        assert len(parts) == (2 if is_copied else 5)  # behind a header
        large.zero_()
        assert any(not any(bytes(part)) for part in parts) == (not is_copied)

    def test_none_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"".join(tensor_parts({})))
        assert load_file(tmp_path / "file") == {}

    def test_a_dtype_that_is_not_known_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"phase: a tensor of torch.complex64"):
            tensor_parts({"phase": torch.zeros(2, dtype=torch.complex64)})


class TestValues:
    @pytest.mark.parametrize(
        "values",
        [
            {},
            None,
            [],
            (),
            {"a": [1, (2.5, None, True), {"b": "ä\ud7ff"}], 3: {None: (), (1, 2): []}},
            [["tensor", "x", 0, [1]], ["dict"], ["tuple", 1]],
            [0.1, -0.0, 1e-300, float("inf"), float("nan"), 2**70, -1],
            {"1": "text", 1: "number"},
        ],
    )
    def test_plain_ones(self, tmp_path: Path, values: Any) -> None:
        assert equal(back(values, tmp_path), values)

    def test_tensors_of_every_dtype_and_shape(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        values = [
            {"tensor": (torch.randn(shape) * 100).to(dtype), "step": number}
            for dtype in DTYPES
            for number, shape in enumerate([(3, 5), (1,), (), (0, 4), (257,)])
        ]
        assert equal(back(values, tmp_path), values)

    def test_one_that_is_shared_is_written_once_and_stays_shared(self, tmp_path: Path) -> None:
        shared = torch.randn(10_000)
        read = back([shared, {"again": shared}, shared[:5], shared.clone()], tmp_path)
        assert read[0] is read[1]["again"]
        assert read[0] is not read[3]
        assert read[2].equal(shared[:5])
        assert (tmp_path / "values").stat().st_size < 2.2 * 40_000

    def test_each_has_memory_of_its_own(self, tmp_path: Path) -> None:
        read = back([torch.zeros(3, dtype=torch.uint8), torch.ones(5, dtype=torch.uint8)], tmp_path)
        for tensor in read:
            assert tensor.data_ptr() % 16 == 0
            assert tensor.untyped_storage().nbytes() == tensor.numel()

    def test_not_contiguous(self, tmp_path: Path) -> None:
        square = torch.arange(16.0).reshape(4, 4)
        read = back([square, square.t(), square[::2, 1:]], tmp_path)
        assert equal(read, [square, square.t(), square[::2, 1:]])

    def test_random_generators(self, tmp_path: Path) -> None:
        words = torch.from_numpy(np.random.get_state()[1].astype(np.int64))  # type: ignore[index,union-attr]
        values = {"python": random.getstate(), "torch": torch.get_rng_state(), "numpy": words}
        read = back(values, tmp_path)
        assert equal(read, values)
        random.setstate(read["python"])
        torch.set_rng_state(read["torch"])

    def test_an_optimizer_goes_on_as_if_nothing_had_been(self, tmp_path: Path) -> None:
        def updates(parameter: torch.nn.Parameter, optimizer: Any, count: int) -> None:
            for _ in range(count):
                parameter.grad = torch.sin(parameter.detach() * 3)
                optimizer.step()

        torch.manual_seed(0)
        whole = torch.nn.Parameter(torch.randn(64, 128))
        optimizer = PagedAdamW8bit([whole], lr=1e-2)
        updates(whole, optimizer, 3)
        resumed = torch.nn.Parameter(whole.detach().clone())
        state = back(optimizer.state_dict(), tmp_path)
        updates(whole, optimizer, 3)
        other = PagedAdamW8bit([resumed], lr=1e-2)
        other.load_state_dict(state)
        updates(resumed, other, 3)
        assert resumed.equal(whole)

    @pytest.mark.parametrize("value", [{1, 2}, np.float32(1), b"bytes", object(), torch.float32])
    def test_another_type_is_refused(self, tmp_path: Path, value: Any) -> None:
        with pytest.raises(TypeError, match=f"a {type(value).__name__} cannot be written"):
            value_parts({"a": [value]})
        assert not (tmp_path / "values").exists()
