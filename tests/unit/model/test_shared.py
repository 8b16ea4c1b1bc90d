"""A base quantized once and read from the cache is the base quantized anew, to the bit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_kit.environment import probe_hardware
from qlora_kit.errors import HardwareError, ModelError
from qlora_kit.model.base import Base, load_base
from qlora_kit.model.quantized_cache import entry_folder
from qlora_kit.model.shared import require_same_base, state_checksum
from qlora_kit.recipe import ModelSpec, QuantizationSpec

KINDS: dict[str, dict[str, Any]] = {
    "nf4, double": {},
    "fp4 in bfloat16": {"quant_type": "fp4", "double_quant": False, "quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


def load(model: Path, kind: str = "nf4, double", is_shared: bool = True) -> Base:
    return load_base(
        ModelSpec(name_or_path=str(model)),
        QuantizationSpec(**KINDS[kind]),
        torch.float32,
        "test",
        probe_hardware(),
        is_shared=is_shared,
    )


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """Of a quantization state, the nested one too."""
    for value in vars(state).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif hasattr(value, "absmax"):
            yield from tensors_of(value)


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_read_is_what_was_quantized(tiny_llama: Path, cache: Path, kind: str) -> None:
    anew = load(tiny_llama, kind, is_shared=False)
    assert not cache.exists(), "one process alone writes nothing"
    wrote = load(tiny_llama, kind)
    (folder,) = cache.iterdir()
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    read = load(tiny_llama, kind)
    assert weights.stat().st_mtime_ns == before
    assert state_checksum(anew.model) == state_checksum(wrote.model) == state_checksum(read.model)
    for (name, one), (_, other) in zip(
        anew.model.named_parameters(), read.model.named_parameters(), strict=True
    ):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name
        state = getattr(one, "quant_state", None)
        if state is not None:
            pairs = zip(tensors_of(state), tensors_of(other.quant_state), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs), name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(anew.model(ids).logits, read.model(ids).logits)
    assert read.model.config.name_or_path == anew.model.config.name_or_path
    assert read.quantized == anew.quantized
    assert wrote.model.config.dtype == read.model.config.dtype == torch.float32


@pytest.mark.parametrize("where", [-100, -50_000, "short", "state"])
def test_a_damaged_one_is_made_anew(tiny_llama: Path, cache: Path, where: int | str) -> None:
    whole = state_checksum(load(tiny_llama).model)
    (weights,) = cache.glob("*/model.safetensors")
    content = bytearray(weights.read_bytes())
    if where == "state":
        (weights.parent / "entry.json").write_text("{")
    elif isinstance(where, int):
        content[where] ^= 1
        weights.write_bytes(content)
    else:
        weights.write_bytes(content[:-1000])
    before = weights.stat().st_mtime_ns
    assert state_checksum(load(tiny_llama).model) == whole
    assert weights.stat().st_mtime_ns != before


def test_what_nobody_used_for_a_month_is_removed(tiny_llama: Path, cache: Path) -> None:
    load(tiny_llama)
    (old,) = cache.iterdir()
    past = time.time() - 40 * 24 * 3600
    os.utime(old / "used", (past, past))
    load(tiny_llama, "int8")
    (left,) = cache.iterdir()
    assert left != old


def test_no_room_is_said(tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("qlora_kit.atomic.shutil.disk_usage", lambda place: usage)
    with pytest.raises(HardwareError, match="QLORA_KIT_CACHE"):
        load(tiny_llama)
    assert not cache.exists()


def test_everything_that_decides_the_numbers_is_in_the_name() -> None:
    given = ("f" * 64, {"load_in_4bit": True}, torch.float32, "cpu")
    others = [
        ("e" * 64, *given[1:]),
        (given[0], {"load_in_4bit": False}, *given[2:]),
        (*given[:2], torch.bfloat16, "cpu"),
        (*given[:3], "cuda"),
    ]
    assert len({entry_folder(*one) for one in [given, *others]}) == 5


def test_other_weights_on_another_process_are_refused() -> None:
    require_same_base(["a", "a"])
    with pytest.raises(ModelError, match="processes 1, 2 hold other base weights"):
        require_same_base(["a", "b", "b"])
