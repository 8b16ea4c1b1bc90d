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
    kind, values = DENSE[name]
    build(tmp_path / "model", kind, values)
    train = {"per_device_train_batch_size": 8}
    data = {"padding_free": "auto"}
    recipe = recipe_for(tmp_path, tmp_path / "model", train=train, data=data)
    ready = prepare(recipe, probe_hardware(), ALONE, SILENT)
    wanted = alive_in_a_step(ready, recipe, count)
    vocabulary = load_vocabulary(recipe.model)
    planner = Planner(vocabulary, probe_hardware(), 8 * _GIB)
    monkeypatch.setattr(Kept, "fewest", lambda *_: count)
    plan = planner.plan(recipe, train_rows(recipe, vocabulary))
    training = plan.moment("training")
    found = training.tensor_bytes - training.components["optimizer"]
    assert found == pytest.approx(wanted, rel=0.03)
