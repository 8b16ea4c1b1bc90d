"""The processes that attempts are forked from; their start takes longer than most runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from crash.case import Case, prepare_case
from crash.forks import Zygote, zygotes


@pytest.fixture(scope="session")
def forks() -> Iterator[list[Zygote]]:
    with zygotes(1) as started:
        yield started


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, forks: list[Zygote]) -> Case:
    """One recipe with everything that has a state, and all that follows training."""
    return prepare_case(
        tmp_path_factory.mktemp("crash") / "case",
        tiny_llama,
        0,
        forks[0],
        data={"packing": False, "streaming": False, "held_out": 0.25, "eval": []},
        lora={"dropout": 0.1},
        train={
            "max_steps": 6,
            "optim": "paged_adamw_8bit",
            "logging_steps": 1,
            "neftune_noise_alpha": 5.0,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 1,
            "keep_best": True,
        },
        quantization_aware=None,
        export={"merge": True},
    )
