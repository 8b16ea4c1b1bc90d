"""Schedules and optimizers are upstream's: their names exist, and their arguments are known."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest
import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from qlora_kit.recipe.schedule import SCHEDULE_ARGUMENTS, Schedule, schedule_faults
from qlora_kit.recipe.train import Optimizer

# What get_scheduler passes itself; `num_stable_steps` it warns about beside num_training_steps.
PASSED_BY_TRAINER = {
    "optimizer",
    "num_warmup_steps",
    "num_training_steps",
    "last_epoch",
    "num_stable_steps",
}
SETTINGS = {"learning_rate": 1e-3, "warmup_steps": 0.03}


def test_each_optimizer_exists_upstream() -> None:
    assert {*get_args(Optimizer)} - {"auto"} <= {name.value for name in OptimizerNames}


def test_each_schedule_exists_upstream() -> None:
    assert set(get_args(Schedule)) <= {name.value for name in SchedulerType}
    assert set(get_args(Schedule)) == set(SCHEDULE_ARGUMENTS)


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_the_arguments_are_upstreams(schedule: Schedule) -> None:
    function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(schedule)]
    if schedule == "reduce_lr_on_plateau":
        function = torch.optim.lr_scheduler.ReduceLROnPlateau
    theirs = set(inspect.signature(function).parameters) - PASSED_BY_TRAINER
    assert set(SCHEDULE_ARGUMENTS[schedule]) == theirs


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [
        ("cosine", {}),
        ("cosine", {"num_cycles": 0.5}),
        ("polynomial", {"lr_end": 1e-5, "power": 2}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "warmup_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 10, "decay_type": "1-sqrt"}),
        ("reduce_lr_on_plateau", {"factor": 0.5, "mode": "min"}),
        ("inverse_sqrt", {"timescale": 100}),
    ],
)
def test_what_passes_builds_upstream(schedule: Schedule, arguments: dict[str, float]) -> None:
    assert list(schedule_faults(schedule, arguments, **SETTINGS)) == []
    build(schedule, arguments)


@pytest.mark.parametrize(
    ("schedule", "arguments", "piece"),
    [
        ("cosine", {"num_cycle": 1}, "did you mean 'num_cycles'"),
        ("linear", {"power": 2}, "takes no further arguments"),
        ("cosine_with_min_lr", {}, "got neither"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "got both"),
        ("warmup_stable_decay", {}, "needs num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "x"}, "linear, cosine"),
        ("polynomial", {"lr_end": 1.0}, "not below learning_rate"),
    ],
)
def test_what_is_refused_fails_upstream(
    schedule: Schedule, arguments: dict[str, float], piece: str
) -> None:
    (fault,) = schedule_faults(schedule, arguments, **SETTINGS)
    assert piece in str(fault)
    with pytest.raises((TypeError, ValueError)):
        build(schedule, arguments)


def test_text_is_no_number() -> None:
    (fault,) = schedule_faults("cosine", {"num_cycles": "half"}, **SETTINGS)
    assert "must be a number, got 'half'" in str(fault)


@pytest.mark.parametrize("schedule", ["constant", "reduce_lr_on_plateau"])
def test_a_warm_up_that_would_be_ignored(schedule: Schedule) -> None:
    assert not list(schedule_faults(schedule, {}, learning_rate=1e-3, warmup_steps=0))
    (fault,) = schedule_faults(schedule, {}, learning_rate=1e-3, warmup_steps=10)
    assert "has no warm-up" in str(fault)


def build(schedule: str, arguments: dict[str, float]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    get_scheduler(
        schedule,
        optimizer,
        num_warmup_steps=3,
        num_training_steps=100,
        scheduler_specific_kwargs=dict(arguments),
    )
