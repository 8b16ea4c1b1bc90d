"""A start takes the shortcuts that are known to be exact, and tries where nothing is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora_kit.model.blockwise_attention import FEWEST_TOKENS
from qlora_kit.model.fused import linear
from qlora_kit.processes import ALONE
from qlora_kit.recipe import TrainSpec
from qlora_kit.train import facts, known_shortcuts
from qlora_kit.train.known_shortcuts import Choice, key_of, known_or_tried
from qlora_kit.train.shortcuts import choose_shortcuts
from qlora_kit.train.snapshot import Progress


class Heard:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class Start:
    """One start after the other on the same model."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch):
        self.model = model
        self.num_trials = 0
        self.heard = Heard()

        def counted(*arguments: Any) -> Any:
            self.num_trials += 1
            return choose_shortcuts(*arguments)

        monkeypatch.setattr(known_shortcuts, "choose_shortcuts", counted)

    def __call__(
        self,
        before: Choice | None = None,
        precision: str = "fp32",
        is_sharded: bool = False,
        others: Any = None,
        longest: int = 0,
        **train: Any,
    ) -> Choice:
        gathered = ALONE.gathered if others is None else lambda one: [one, others]
        around: Any = SimpleNamespace(
            precision=precision,
            reporter=self.heard,
            processes=SimpleNamespace(gathered=gathered),
        )
        progress = None
        if before is not None:  # through a checkpoint's file
            values = Progress(shortcuts=before.as_dict()).as_dict()
            progress = Progress.from_dict(json.loads(json.dumps(values)))
        spec = TrainSpec(**train)
        return known_or_tried(self.model, spec, around, is_sharded, progress, longest)


@pytest.fixture
def model(adapted_llama: Any) -> Any:
    return adapted_llama


@pytest.fixture
def start(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    return Start(model, monkeypatch)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fails on this machine."""

    def fails(*_: Any) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(linear._SharedInput, "forward", staticmethod(fails))


def test_a_second_start_takes_what_the_first_has_tried(start: Start) -> None:
    first = start()
    assert first.shortcuts.fusion is not None
    assert first.shortcuts.supervised_loss
    assert start() == first
    assert start.num_trials == 1
    assert not start.heard.warnings


@pytest.mark.parametrize(
    "other", [{"precision": "bf16"}, {"fused_lora": False}, {"is_sharded": True}]
)
def test_what_was_tried_for_something_else_does_not_count(start: Start, other: Any) -> None:
    first, second = start(), start(**other)
    assert start.num_trials == 2
    assert second != first


def test_another_adapter_is_tried_anew(start: Start, model: Any) -> None:
    start()
    base = model.unload()
    start.model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear")).train()
    start()
    assert start.num_trials == 2


def test_other_code_of_ours_is_tried_anew(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    monkeypatch.setattr(facts, "_code", lambda: ["another"])
    start()
    assert start.num_trials == 2


def test_a_model_with_code_of_its_own_is_tried_at_every_start(start: Start, model: Any) -> None:
    class Own(torch.nn.Dropout):
        pass

    model.base_model.model.model.own = Own()
    assert key_of(model, TrainSpec(), "fp32") is None
    assert start().key is None
    start()
    assert start.num_trials == 2


def test_what_had_to_be_left_out_is_tried_again(start: Start, broken: None) -> None:
    assert "no kernel" in start().shortcuts.left[0]
    start()
    assert start.num_trials == 2


def test_a_checkpoint_that_did_without_goes_on_without(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory ran out on the trial, on a machine that was busy then."""
    with monkeypatch.context() as patch:
        patch.setattr(linear._SharedInput, "forward", staticmethod(_runs_out))
        before = start()
    assert before.shortcuts.fusion is None
    again = start(before)
    assert again == before
    assert start.num_trials == 1
    assert start().shortcuts.fusion is not None, "a run that begins tries all"


def _runs_out(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_other_shortcuts_than_a_checkpoint_had_are_told(start: Start, broken: None) -> None:
    first = start()
    whole = replace(first.shortcuts, lean=replace(first.shortcuts.lean, mlps=("one", "two")))
    start(Choice(whole, "another machine"))
    (warning,) = start.heard.warnings
    assert "the checkpoint was trained with other shortcuts" in warning
    assert "2 MLPs" in warning
    start(Choice(first.shortcuts, "another machine"))
    assert len(start.heard.warnings) == 1


def test_a_checkpoint_of_an_older_version_says_nothing(start: Start) -> None:
    around: Any = SimpleNamespace(precision="fp32", reporter=start.heard, processes=ALONE)
    known_or_tried(start.model, TrainSpec(), around, False, Progress.from_dict({"update": 3}))
    assert not start.heard.warnings


def test_processes_that_differ_take_none(start: Start) -> None:
    found = start(others={"supervised_loss": False})
    assert found.shortcuts.fusion is None
    assert not found.shortcuts.supervised_loss
    assert found.shortcuts.left == ("processes came to different choices",)


def test_processes_take_the_kernels_that_all_of_them_found_faster(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock may tell one process otherwise; what else is taken stays."""

    def gathered(one: Any) -> list[Any]:
        return [one, ("norm", "rotary")] if isinstance(one, tuple) else [one, one]

    found = replace(choose_shortcuts(model, TrainSpec(), "fp32", False), liger=("norm", "gated"))
    monkeypatch.setattr(known_shortcuts, "choose_shortcuts", lambda *_: found)
    around: Any = SimpleNamespace(
        precision="fp32", reporter=Heard(), processes=SimpleNamespace(gathered=gathered)
    )
    chosen = known_or_tried(model, TrainSpec(), around, False, None).shortcuts
    assert chosen.liger == ("norm",)
    assert chosen.why_kernels.endswith("those that are faster for all processes are taken")
    assert chosen.lean == found.lean


@pytest.mark.parametrize("name", ["onednn", "onednn_logits", "reorders", "blockwise"])
def test_processes_take_what_is_faster_for_all_of_them(
    model: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spec = TrainSpec(use_onednn=True, blockwise_attention=True)
    found = choose_shortcuts(model, spec, "fp32", False, FEWEST_TOKENS)
    assert (found.onednn, found.reorders, found.blockwise) == (True, True, True)
    found = replace(
        found,
        onednn=name in ("onednn", "reorders"),
        onednn_logits=name == "onednn_logits",
        reorders=name == "reorders",
        blockwise=name == "blockwise",
    )
    monkeypatch.setattr(known_shortcuts, "choose_shortcuts", lambda *_: found)
    for theirs in (True, False):

        def gathered(one: Any, theirs: bool = theirs) -> list[Any]:
            return [one, theirs] if isinstance(one, bool) else [one, one]

        around: Any = SimpleNamespace(
            precision="fp32", reporter=Heard(), processes=SimpleNamespace(gathered=gathered)
        )
        # Which no earlier start knows.
        spec = TrainSpec(
            use_onednn=name != "blockwise",
            fused_norm=theirs,
            fused_rotary=name != "reorders",
            fused_mlp=name != "onednn_logits",
        )
        chosen = known_or_tried(model, spec, around, False, None, FEWEST_TOKENS).shortcuts
        assert getattr(chosen, name) is theirs
        assert chosen.why_kernels.endswith("for all processes are taken") is not theirs
        assert chosen.fusion == found.fusion


def test_another_number_of_threads_is_timed_anew(start: Start) -> None:
    before, count = torch.get_num_threads(), start().key
    torch.set_num_threads(before + 1)
    try:
        assert start().key != count
    finally:
        torch.set_num_threads(before)
    assert start().key == count


def test_longer_rows_are_another_question(start: Start) -> None:
    """That no row is long enough for blocks says nothing of one that is."""
    short = start(longest=FEWEST_TOKENS - 1)
    long = start(longest=FEWEST_TOKENS, blockwise_attention=True)
    assert (short.shortcuts.blockwise, long.shortcuts.blockwise) == (False, True)
    assert start(longest=FEWEST_TOKENS - 1, blockwise_attention=True).key != long.key
    assert start(longest=FEWEST_TOKENS + 1, blockwise_attention=True) == long
    assert start(longest=256, blockwise_attention=True).key != long.key, "it is timed on more"


def test_a_checkpoint_keeps_that_attention_went_in_blocks(start: Start) -> None:
    how: dict[str, Any] = {"longest": FEWEST_TOKENS, "blockwise_attention": True}
    first = start(**how)
    assert first.shortcuts.blockwise
    assert start(Choice(first.shortcuts, first.key), **how) == first
    start(Choice(replace(first.shortcuts, blockwise=False), "another machine"), **how)
    (warning,) = start.heard.warnings
    assert "attention in blocks" in warning


def test_a_checkpoint_keeps_that_onednn_multiplied(start: Start) -> None:
    first = start(use_onednn=True)
    assert first.shortcuts.onednn
    assert start(Choice(first.shortcuts, first.key), use_onednn=True) == first
    start(Choice(replace(first.shortcuts, onednn=False), "another machine"), use_onednn=True)
    (warning,) = start.heard.warnings
    assert "oneDNN's products" in warning


def test_a_checkpoint_keeps_that_onednn_made_the_logits(start: Start) -> None:
    first = start()
    with_logits = replace(first.shortcuts, onednn_logits=True)
    assert start(Choice(with_logits, first.key)).shortcuts == with_logits
    start(Choice(replace(first.shortcuts, onednn_logits=True), "another machine"))
    (warning,) = start.heard.warnings
    assert "oneDNN's logits" in warning
