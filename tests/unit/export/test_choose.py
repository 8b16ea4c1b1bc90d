"""Which merge is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from qlora_kit.evaluate.divergence import Divergence
from qlora_kit.export.choose import (
    Candidate,
    choose_base,
    measured_rows,
    show_candidates,
    why_beyond_budget,
)
from qlora_kit.export.merge import MergeResult, Survival
from qlora_kit.export.trained import BaseKind
from qlora_kit.report.reporter import Reporter


def candidate(base: BaseKind, kl: float, loss: float, faults: tuple[str, ...] = ()) -> Candidate:
    divergence = Divergence(
        kl_mean=kl,
        kl_max=kl,
        top1_agreement=0.99,
        max_abs_delta_logp=0.1,
        reference_loss=1.0,
        candidate_loss=loss,
        reference_perplexity=2.7,
        candidate_perplexity=2.8,
        num_tokens=1239,
    )
    result = MergeResult(
        folder=Path("merged"),
        base=base,
        dtype="bfloat16",
        survival=Survival(0.5, 0.9, "q_proj"),
        tied=True,
        num_modules=2,
        num_bytes=100,
        seconds=1.234,
    )
    return Candidate(result, divergence, faults, max_kl=1e-3)


def test_within_the_budget_the_lower_loss_wins() -> None:
    near, good = candidate("dequantized", 1e-6, 1.0), candidate("original", 9e-4, 0.9)
    assert choose_base([near, good]) is good
    assert choose_base([good, near]) is good


def test_a_lower_loss_outside_the_budget_does_not() -> None:
    near, far = candidate("dequantized", 1e-6, 1.0), candidate("original", 0.2, 0.5)
    assert choose_base([near, far]) is near
    assert near.passed
    assert not far.passed


def test_with_none_inside_the_nearest_is_kept_and_fails() -> None:
    one, other = candidate("dequantized", 0.01, 1.0), candidate("original", 0.2, 0.5)
    assert choose_base([other, one]) is one
    assert not choose_base([other, one]).passed


def test_what_does_not_come_back_never_passes() -> None:
    broken = candidate("dequantized", 0.0, 1.0, faults=("the chat template is another one",))
    assert not broken.passed
    sound = candidate("original", 9e-4, 1.1)
    assert choose_base([broken, sound]) is sound


def test_what_8_bit_layers_add_to_the_distance_is_said() -> None:
    far, near = candidate("dequantized", 0.00182, 1.0), candidate("dequantized", 1e-4, 1.0)
    (note,) = why_beyond_budget(far, 3)
    assert "3 layers of the base are kept in 8 bits" in note
    assert "--max-kl 0.0019" in note
    assert why_beyond_budget(far, 0) == why_beyond_budget(near, 3) == []
    (note,) = why_beyond_budget(far, 0, "bfloat16")
    assert note.startswith("what was trained computes in bfloat16")
    assert "--max-kl 0.0019" in note
    assert why_beyond_budget(near, 0, "bfloat16") == []
    assert why_beyond_budget(candidate("original", 0.2, 1.0), 3) == []
    assert why_beyond_budget(candidate("dequantized", 0.2, 1.0, ("torn",)), 3) == []


class Table(Reporter):
    def __init__(self) -> None:
        self.rows: list[Sequence[str]] = []
        self.said: list[str] = []
        self.titles: list[str] = []

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        assert all(len(row) == len(columns) for row in rows)
        self.rows += rows
        self.titles.append(title)

    def say(self, text: str) -> None:
        self.said.append(text)


def test_both_lines_of_figures_are_shown() -> None:
    table = Table()
    both = [candidate("dequantized", 1e-6, 1.0), candidate("original", 0.2, 0.5)]
    show_candidates(both, both[0], 1e-3, table, measured_on=measured_rows(64, 64))
    assert len(table.rows) == 3
    assert "kept" in table.rows[1][0]
    assert table.titles == [
        "Merge, on 1,239 tokens of the first 64 held-out rows (budget: KL 0.001)"
    ]
    assert measured_rows(1, 64) == "1 held-out row"
    assert "over budget" in table.rows[2][2]
    assert both[1].as_dict()["survival"] == {"min": 0.5, "median": 0.9, "worst": "q_proj"}


def test_a_better_model_beyond_the_budget_is_named_with_how_to_keep_it() -> None:
    table = Table()
    both = [candidate("dequantized", 1e-6, 1.0), candidate("original", 0.2, 0.5)]
    show_candidates(both, choose_base(both), 1e-3, table)
    [said] = table.said
    assert "The original base predicts the held-out rows better" in said
    assert "--base original --max-kl 0.21, into another folder with --out" in said
    assert both[1].divergence.kl_mean < 0.21


@pytest.mark.parametrize(
    "other",
    [
        candidate("original", 0.2, 1.5),
        candidate("original", 9e-4, 0.5),
        candidate("original", 0.2, 0.5, faults=("the tied head is not tied",)),
    ],
    ids=["worse", "within the budget and kept", "does not come back"],
)
def test_nothing_is_said_of_a_model_that_would_not_be_better(other: Candidate) -> None:
    table = Table()
    both = [candidate("dequantized", 1e-6, 1.0), other]
    show_candidates(both, choose_base(both), 1e-3, table)
    assert table.said == []
