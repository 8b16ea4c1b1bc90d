"""What a trial without numbers says of many families, beside what is alive in a step with them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from model.zoo import DENSE, build  # type: ignore[import-not-found]

from qlora_kit.environment import probe_hardware
from qlora_kit.memory.kept import Kept
from qlora_kit.model.vocabulary import load_vocabulary
from qlora_kit.plan.plan import Planner
from qlora_kit.plan.rows import train_rows
from qlora_kit.processes import ALONE
from qlora_kit.report.reporter import SILENT
from qlora_kit.stages.prepare import prepare

from .test_trial import alive_in_a_step, recipe_for

_GIB = 2**30


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("name", DENSE)
def test_a_trial_says_what_a_step_takes(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight rows, padded or in one row as the family has it."""
    found, wanted = told_and_taken(name, 8, count, tmp_path, monkeypatch)
    assert found == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("padding_free", ["auto", False])
@pytest.mark.parametrize("name", ["mistral", "stablelm", "gpt-j: head with a bias", "mpt"])
def test_a_mask_that_hides_nothing_is_seen_to(
    name: str, padding_free: str | bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of two rows of one length: transformers then gives torch's attention none."""
    found, wanted = told_and_taken(name, 2, 0, tmp_path, monkeypatch, padding_free)
    assert found == pytest.approx(wanted, rel=0.01)


def told_and_taken(
    name: str,
    batch: int,
    count: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    padding_free: str | bool = "auto",
) -> tuple[int, int]:
    """Bytes of tensors at the peak of a step, by a plan and on real ones."""
    kind, values = DENSE[name]
    build(folder / "model", kind, values)
    train = {"per_device_train_batch_size": batch}
    data = {"padding_free": padding_free}
    recipe = recipe_for(folder, folder / "model", train=train, data=data)
    ready = prepare(recipe, probe_hardware(), ALONE, SILENT)
    wanted = alive_in_a_step(ready, recipe, count)
    vocabulary = load_vocabulary(recipe.model)
    planner = Planner(vocabulary, probe_hardware(), 8 * _GIB)
    monkeypatch.setattr(Kept, "fewest", lambda *_: count)
    plan = planner.plan(recipe, train_rows(recipe, vocabulary))
    training = plan.moment("training")
    return training.tensor_bytes - training.components["optimizer"], wanted
