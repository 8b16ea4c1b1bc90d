"""A base quantized once and read from the cache is the base quantized anew, to the bit."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_llama, load_tiny

from qlora_kit.errors import HardwareError
from qlora_kit.model.base import Base
from qlora_kit.model.load import load_model
from qlora_kit.model.quantized_cache import entry_folder
from qlora_kit.model.shared import state_checksum
from qlora_kit.recipe import QuantizationSpec
from qlora_kit.report.reporter import SILENT, Reporter

KINDS: dict[str, dict[str, Any]] = {
    "nf4, double": {},
    "fp4 in bfloat16": {"quant_type": "fp4", "double_quant": False, "quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


class Listener(Reporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def load(
    model: Path,
    kind: str = "nf4, double",
    is_shared: bool = True,
    reporter: Reporter = SILENT,
) -> Base:
    quantization = QuantizationSpec(**KINDS[kind])
    return load_tiny(model, quantization, is_shared=is_shared, reporter=reporter)


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
    told = Listener()
    assert state_checksum(load(tiny_llama, reporter=told).model) == whole
    assert weights.stat().st_mtime_ns != before
    (warning,) = told.warnings
    assert ("entry.json" if where == "state" else "model.safetensors") in warning
    assert "quantized anew" in warning


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
    model = {"attention_dropout": 0.0, "_name_or_path": "here"}
    given = ("f" * 64, {"load_in_4bit": True}, torch.float32, "cpu", model)
    others = [
        ("e" * 64, *given[1:]),
        (given[0], {"load_in_4bit": False}, *given[2:]),
        (*given[:2], torch.bfloat16, "cpu", model),
        (*given[:3], "cuda", model),
        (*given[:4], {**model, "attention_dropout": 0.1}),
    ]
    assert len({entry_folder(*one) for one in [given, *others]}) == 6
    elsewhere = (*given[:4], {**model, "_name_or_path": "there"})
    assert entry_folder(*elsewhere) == entry_folder(*given)


@pytest.fixture
def worth_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are worth it, too."""
    monkeypatch.setattr("qlora_kit.model.base._WORTH_KEEPING", 1)


def load_alone(model: Path, kind: str = "nf4, double", told: Reporter = SILENT) -> Base:
    return load(model, kind, is_shared=False, reporter=told)


@pytest.mark.usefixtures("worth_keeping")
class TestOneProcessAlone:
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_quantizes_once(
        self, tiny_llama: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = load_alone(tiny_llama, kind)
        read_from: list[Path | None] = []

        def noting(*arguments: Any) -> Any:
            read_from.append(arguments[6])
            return load_model(*arguments)

        monkeypatch.setattr("qlora_kit.model.base.load_model", noting)
        second = load_alone(tiny_llama, kind)
        assert None not in read_from, "the weights in 16 bits were read again"
        assert first.origin == "quantized anew and kept for the next start"
        assert second.origin == "quantized before: read from the cache, verified"
        assert state_checksum(first.model) == state_checksum(second.model)

    def test_another_base_is_not_taken_for_it(self, tmp_path: Path) -> None:
        one = build_llama(tmp_path / "m", seed=0)
        load_alone(one)
        build_llama(one, seed=1)
        other = load_alone(one)
        assert other.origin == "quantized anew and kept for the next start"

    def test_the_same_weights_configured_otherwise_are_not_taken_for_it(
        self, tmp_path: Path
    ) -> None:
        """As where somebody has written another scaling of positions, or dropout, into it."""
        one = build_llama(tmp_path / "m", seed=0)
        assert load_alone(one).model.config.attention_dropout == 0
        config = json.loads((one / "config.json").read_text())
        (one / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.25}))
        other = load_alone(one)
        assert other.model.config.attention_dropout == 0.25
        assert load_alone(one).origin == "quantized before: read from the cache, verified"

    def test_keeps_nothing_where_that_is_asked(
        self, tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("QLORA_KIT_QUANTIZED_GIB", "0")
        assert load_alone(tiny_llama).origin == "quantized anew"
        assert not cache.exists()

    @pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
    def test_no_number_is_an_error(
        self, tiny_llama: Path, text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("QLORA_KIT_QUANTIZED_GIB", text)
        with pytest.raises(HardwareError, match=f"QLORA_KIT_QUANTIZED_GIB is '{text}'"):
            load_alone(tiny_llama)

    def test_what_was_used_last_stays_within_the_limit(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models = [build_llama(tmp_path / str(seed), seed=seed) for seed in range(3)]
        monkeypatch.setattr("qlora_kit.model.quantized_cache._OTHER_FILES_BYTES", 0)
        load_alone(models[0])
        (first,) = cache.iterdir()
        size = sum(one.stat().st_size for one in first.iterdir())
        monkeypatch.setenv("QLORA_KIT_QUANTIZED_GIB", str(2.5 * size / 2**30))
        load_alone(models[1])
        (second,) = set(cache.iterdir()) - {first}
        past = time.time() - 60
        os.utime(second / "used", (past, past))
        load_alone(models[0])
        load_alone(models[2])
        assert first in cache.iterdir()
        assert second not in cache.iterdir()

    def test_one_that_is_too_large_is_not_kept(
        self, tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("QLORA_KIT_QUANTIZED_GIB", "1e-6")
        told = Listener()
        assert load_alone(tiny_llama, told=told).origin == "quantized anew"
        (warning,) = told.warnings
        assert "not kept for the next start" in warning
        assert "QLORA_KIT_QUANTIZED_GIB allows 1,073" in warning
        assert not cache.exists()

    def test_a_disk_without_room_costs_a_warning(
        self, tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = type("Usage", (), {"free": 1000})()
        monkeypatch.setattr("qlora_kit.atomic.shutil.disk_usage", lambda place: usage)
        told = Listener()
        assert load_alone(tiny_llama, told=told).origin == "quantized anew"
        (warning,) = told.warnings
        assert "no room on the disk" in warning
        assert not cache.exists()

    def test_a_place_that_cannot_be_written_costs_a_warning(
        self, tiny_llama: Path, cache: Path
    ) -> None:
        cache.parent.mkdir()
        cache.write_text("a file in its place")
        told = Listener()
        assert load_alone(tiny_llama, told=told).origin == "quantized anew"
        (warning,) = told.warnings
        assert "not kept for the next start" in warning

    def test_a_disk_that_fills_while_it_is_written_costs_a_warning(
        self, tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        told = Listener()
        base = load_alone(tiny_llama, told=told)
        assert base.origin == "quantized anew"
        assert base.model.config.dtype == torch.float32
        (warning,) = told.warnings
        assert "No space left on device" in warning
        assert list(cache.iterdir()) == []


def test_a_small_model_is_quantized_sooner_than_read(tiny_llama: Path, cache: Path) -> None:
    assert load_alone(tiny_llama).origin == ""
    assert not cache.exists()
