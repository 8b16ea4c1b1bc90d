"""What a trial without numbers says of many families, beside what is alive in a step with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.recipe import Recipe

from ..model.zoo import DENSE, MIXTURES, build
from .test_trial import recipe_for, told_and_taken


def recipe_of(name: str, folder: Path, batch: int, padding_free: str | bool) -> Recipe:
    """Of a family's tiny model, with so many rows at a time. Mixtures cannot be quantized."""
    kind, values = {**DENSE, **MIXTURES}[name]
    build(folder / "model", kind, values)
    return recipe_for(
        folder,
        folder / "model",
        train={"per_device_train_batch_size": batch},
        data={"padding_free": padding_free},
        **({"quantization": {"load_in_4bit": False}} if name in MIXTURES else {}),
    )


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
def test_a_trial_says_what_a_step_takes(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight rows, padded or in one row as the family has it."""
    recipe = recipe_of(name, tmp_path, 8, "auto")
    told, taken = told_and_taken(recipe, count, monkeypatch)
    assert told == pytest.approx(taken, rel=0.03)


@pytest.mark.parametrize("padding_free", ["auto", False])
@pytest.mark.parametrize("name", ["mistral", "stablelm", "gpt-j: head with a bias", "mpt", "opt"])
def test_a_mask_that_hides_nothing_is_seen_to(
    name: str, padding_free: str | bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of two rows of one length: transformers then gives torch's attention none."""
    recipe = recipe_of(name, tmp_path, 2, padding_free)
    told, taken = told_and_taken(recipe, 0, monkeypatch)
    assert told == pytest.approx(taken, rel=0.01)
