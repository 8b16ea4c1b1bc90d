"""When to save and to stop, and what is noticed on the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from qlora_kit.errors import CheckpointError
from qlora_kit.recipe import TrainSpec
from qlora_kit.train.cadence import Cadence, is_saved_beside, saves_on_its_way
from qlora_kit.train.requests import TRIGGER_FILE, Requests

ALONE: Any = SimpleNamespace(world_size=1)


class Hooks:
    """A run whose writer has met something, or that cannot be saved."""

    def __init__(self, fault: str = "", can_save: bool = True):
        self.fault = fault
        self.is_possible = can_save
        self.warnings: list[str] = []

    def has_failed(self) -> bool:
        return bool(self.fault)

    def settle(self) -> None:
        raise CheckpointError(self.fault)

    def can_save(self) -> bool:
        return self.is_possible

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def after_update(number: int, folder: Path, hooks: Any, **spec: Any) -> TrainerControl:
    cadence = Cadence(TrainSpec(**spec), 10, 100, Requests(folder / TRIGGER_FILE), hooks)
    control = TrainerControl()
    return cadence.on_step_end(ALONE, TrainerState(global_step=number), control)


def test_a_write_that_failed_is_raised_after_the_next_update(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the disk is full"):
        after_update(7, tmp_path, Hooks("the disk is full"), save_strategy="steps", save_steps=50)


@pytest.mark.parametrize(
    ("spec", "updates_per_pass", "told"),
    [
        ({}, 10, False),  # one epoch, saved at its end
        ({"num_train_epochs": 2}, 0, True),
        ({"num_train_epochs": 0.5}, 10, False),
        ({"max_steps": 10}, 10, False),
        ({"max_steps": 11}, 10, True),
        ({"max_steps": 11}, 0, True),
        ({"save_strategy": "steps", "save_steps": 10}, 10, False),
        ({"save_strategy": "steps", "save_steps": 9}, 10, True),
        ({"save_strategy": "steps", "save_steps": 9, "max_steps": 9}, 10, False),
        ({"save_strategy": "steps", "save_steps": 9}, 0, True),
        ({"save_strategy": "no"}, 10, False),
        ({"save_strategy": "no", "save_minutes": 5}, 10, True),
    ],
)
def test_whether_a_checkpoint_is_written_on_the_way(
    spec: dict[str, Any], updates_per_pass: int, told: bool
) -> None:
    assert saves_on_its_way(TrainSpec(**spec), updates_per_pass) == told


@pytest.mark.parametrize("limit", [{}, {"memory_budget": "4GiB"}, {"max_memory_mib": 4000}])
def test_training_waits_for_the_writer_where_memory_is_limited(limit: dict[str, Any]) -> None:
    """On a CPU, whose memory the copy would be in."""
    spec = TrainSpec(**limit)
    assert is_saved_beside(spec, "cpu") == (not limit)
    assert is_saved_beside(spec, "cuda")


def test_what_cannot_be_put_back_is_not_saved_and_that_is_told(tmp_path: Path) -> None:
    (tmp_path / TRIGGER_FILE).touch()
    hooks = Hooks(can_save=False)
    assert not after_update(7, tmp_path, hooks, save_strategy="no").should_save
    assert hooks.warnings == [
        "no checkpoint is written: DeepSpeed's optimizer cannot be put back exactly yet."
    ]
    assert not after_update(8, tmp_path, hooks, save_strategy="no").should_save
    assert len(hooks.warnings) == 1, "nobody asked"
    (tmp_path / TRIGGER_FILE).touch()
    assert after_update(9, tmp_path, Hooks(), save_strategy="no").should_save
