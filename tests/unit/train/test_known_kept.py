"""What layers keep is counted once for a model, and not for each of its starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_kit.data.collate import Collator, IsolatingCollator
from qlora_kit.memory.kept import Kept, measure_kept
from qlora_kit.train import known_kept
from qlora_kit.train.known_kept import known_or_counted

AROUND: Any = SimpleNamespace(precision="fp32")


class Start:
    """One after the other, each with the count that it came to."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch):
        self.model = model
        self.num_counts = 0

        def counted(*arguments: Any) -> Kept:
            self.num_counts += 1
            return measure_kept(*arguments)

        monkeypatch.setattr(known_kept, "measure_kept", counted)

    def __call__(self, key: str | None, by_example: bool = False) -> Kept:
        collator = IsolatingCollator(0, flatten=True) if by_example else Collator(0)
        batches: Any = SimpleNamespace(collator=collator, by_example=by_example)
        return known_or_counted(self.model, batches, AROUND, key)


@pytest.fixture
def start(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    return Start(model, monkeypatch)


def test_a_second_start_has_the_same_count_without_counting(start: Start) -> None:
    first = start("one")
    assert start("one") == first
    assert start.num_counts == 1
    assert len(first.layers) == 2
    assert first.layers[0].linear > 0


def test_another_model_or_other_batches_are_counted(start: Start) -> None:
    start("one")
    start("another")
    start("one", by_example=True)
    assert start.num_counts == 3


def test_what_nobody_can_tell_is_counted_at_every_start(start: Start) -> None:
    start(None)
    start(None)
    assert start.num_counts == 2
