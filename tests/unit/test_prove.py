"""The verdict on a resumed run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_kit import prove
from qlora_kit.errors import RunError
from qlora_kit.prove import Proof, Trace, apart, differences
from qlora_kit.recipe import load_recipe
from qlora_kit.report.reporter import Reporter
from qlora_kit.report.resume import show_proof

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
WHOLE = Trace((2.0, 1.5, 1.25), "o" * 64, "a" * 64, "p" * 64, 1.0)


class Heard(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def verdict(proof: Proof) -> str:
    heard = Heard()
    show_proof(heard, proof)
    return heard.said[-1]


@pytest.mark.parametrize("name", ["order", "adapter", "optimizer"])
def test_one_digest_that_differs_is_found(name: str) -> None:
    other = replace(WHOLE, **{name: "x" * 64})
    assert differences(WHOLE, other) == (name,)
    proof = Proof(WHOLE, other, 3, 2, WHOLE)
    assert not proof.holds
    assert "NOT exact" in verdict(proof)
    assert name in verdict(proof)


def test_the_same_holds_whatever_the_clock_says() -> None:
    proof = Proof(WHOLE, replace(WHOLE, seconds=9.0), 3, 2)
    assert proof.holds
    assert "to the last bit" in verdict(proof)


def test_hardware_that_does_not_repeat_itself_is_the_measure() -> None:
    off = replace(WHOLE, losses=(2.0, 1.5, 1.2502), adapter="b" * 64)
    noisy = replace(WHOLE, losses=(2.0, 1.5, 1.2501), adapter="c" * 64)
    assert apart(WHOLE, off) == pytest.approx(2e-4)
    proof = Proof(WHOLE, off, 3, 2, noisy)
    assert proof.holds
    assert "as this hardware repeats itself" in verdict(proof)
    assert not Proof(WHOLE, replace(off, losses=(2.0, 1.5, 1.3)), 3, 2, noisy).holds
    assert not Proof(WHOLE, replace(off, order="x" * 64), 3, 2, noisy).holds


def test_a_run_that_ends_too_soon_is_made_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that always does is told of in the end."""
    lengths: list[int] = []

    def finished(path: Path) -> Trace:
        (tmp_path / path.stem).mkdir()
        return WHOLE

    def killed(path: Path) -> tuple[int, int] | None:
        lengths.append(load_recipe(path).train.max_steps or 0)
        if lengths[-1] == 24:
            return 3, 2
        (tmp_path / path.stem).mkdir()
        return None

    monkeypatch.setattr(prove, "_finished", finished)
    monkeypatch.setattr(prove, "_killed", killed)
    recipe = load_recipe(RECIPE)
    assert prove.prove_resume(recipe, tmp_path, 6).holds
    assert lengths == [6, 12, 24]
    for name in ("whole", "killed"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(RunError, match="ended too soon"):
        prove.prove_resume(recipe, tmp_path, 5)
