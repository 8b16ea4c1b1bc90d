"""What a run says to a person."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch.nn import Module

from qlora_kit.checkpoint.run_directory import RunDirectory
from qlora_kit.model.fused.attach import Fusion
from qlora_kit.model.fused.lean import LeanParts
from qlora_kit.model.fused.norm import KINDS
from qlora_kit.recipe import QuantizationSpec, recipe_from_dict
from qlora_kit.report import narrate
from qlora_kit.report.reporter import Reporter
from qlora_kit.train.recompute import Recompute
from qlora_kit.train.shortcuts import NONE, Shortcuts

NOTHING = {
    "perplexity": None,
    "exact_match": None,
    "metrics": {},
    "num_exact": 0,
    "num_rows": 0,
    "num_unstopped": 0,
}


class Heard(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tables = 0

    def say(self, line: str) -> None:
        self.lines.append(line)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.tables += 1


def test_a_table_without_a_figure_is_not_shown() -> None:
    heard = Heard()
    values = {name: {"name": name, **NOTHING} for name in ("base", "tuned")}
    narrate.evaluation(heard, values, QuantizationSpec())
    assert heard.tables == 0
    values["tuned"]["exact_match"] = 0.5
    narrate.evaluation(heard, values, QuantizationSpec())
    assert heard.tables == 1


def test_what_to_do_next_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "my runs")
    run.folder.mkdir()
    training = {
        "num_steps": 1,
        "seconds": 1,
        "tokens_per_second": 1,
        "first_loss": 1,
        "last_loss": 1,
    }
    memory = {"peak_bytes": 1, "peak_phase": "training"}
    values = {"training": training, "memory": memory, "evaluation": {}, "certificate": None}
    run.summary.write_text(json.dumps(values))
    recipe = recipe_from_dict(
        {"model": {"name_or_path": "m"}, "data": {"train": [{"path": "d"}]}, "run_dir": "r"}, "t"
    )
    heard = Heard()
    narrate.summary(heard, run, recipe)
    assert f"  qlora-kit chat '{run.folder}'" in heard.lines
    assert f"  qlora-kit merge '{run.folder}'" in heard.lines


@pytest.mark.parametrize(
    ("aware", "dtype", "line"),
    [
        (None, "float32", "merged    certified on 1,239 held-out tokens: original base in float32"),
        ({"method": "int8"}, "int8", "quantized certified on 1,239 held-out tokens: int8, as in"),
    ],
)
def test_what_is_certified_is_named(aware: dict[str, str] | None, dtype: str, line: str) -> None:
    figures = {"kl_mean": 0, "top1_agreement": 1, "max_abs_delta_logp": 0}
    perplexities = {"reference_perplexity": 1, "candidate_perplexity": 1}
    heard = Heard()
    narrate.certificate(
        heard,
        {
            "divergence": {"num_tokens": 1239, **figures, **perplexities},
            "passed": True,
            "base": "original",
            "dtype": dtype,
            "max_kl": 1e-3,
            "reload_faults": [],
            "trained_on": {"quantization_aware": aware},
        },
    )
    assert heard.lines[0].startswith(line)


class TestComputing:
    """Which shortcuts are taken, which are not, and which layers compute twice."""

    def lines(
        self, shortcuts: Shortcuts, count: int = 0, reason: str = "", of: int = 4
    ) -> list[str]:
        heard = Heard()
        narrate.computing(heard, shortcuts, Recompute(Module(), count, of, reason))
        return heard.lines

    def test_what_is_left_to_peft_is_said_with_the_reason(self) -> None:
        fusion = Fusion((("a", "b"), ("c",)), Counter({"DoRA and the like": 2}))
        (line,) = self.lines(Shortcuts(True, fusion, 1e-7))
        assert "3 LoRA layers in 2 operations; 2 LoRA layers left to PEFT (DoRA" in line
        assert line.endswith("gradients differ by 1.0e-07")
        heard = Heard()
        narrate.computing(heard, Shortcuts(True, fusion, 0.04), Recompute(Module(), 0, 4, ""), True)
        assert heard.lines[0].endswith("gradients differ by 4.0e-02, as 16 bits round")

    def test_parts_that_keep_less_are_counted(self) -> None:
        lean = LeanParts(("a", "b"), {"c": KINDS[0]})
        (line,) = self.lines(Shortcuts(lean=lean))
        assert "2 MLPs that keep less; 1 norms that keep less" in line

    def test_none_is_said_too(self) -> None:
        assert self.lines(NONE) == ["shortcuts none"]

    def test_why_so_many_recompute(self) -> None:
        assert self.lines(NONE, 3, "so it is")[1] == "recompute 3 of 4 layers: so it is"

    def test_none_of_none_recompute(self) -> None:
        assert self.lines(NONE, 0, "so it is", of=0)[1] == "recompute none: so it is"
