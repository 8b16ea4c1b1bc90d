"""Options that a bench cannot follow are told before it measures, so that no figures are lost."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHES = sorted(
    file.stem.removeprefix("bench_")
    for file in (Path(__file__).parents[3] / "scripts").glob("bench_*.py")
)
WRITERS = ("train", "heap", "plan", "scaling", "loading", "data", "resume", "checkpoint")


def refused(name: str, *options: str) -> int:
    """The exit code of a bench with these options."""
    bench = importlib.import_module(f"bench_{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"bench_{name}.py", *options])
        with pytest.raises(SystemExit) as ended:
            bench.main()
    return int(str(ended.value.code))


@pytest.mark.parametrize("name", BENCHES)
def test_the_options_of_a_bench_are_shown_to_who_asks(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(name, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: bench_{name}.py")
    assert "SUPPRESS" not in shown


@pytest.mark.parametrize("name", WRITERS)
def test_figures_that_could_not_be_written_are_not_measured(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(name, "--json", str(tmp_path / "nowhere" / "found.json")) == 1
    assert "nowhere is no folder; make it first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("train", ["--plot", "found.txt"], "must end in .png, .svg, .pdf, got found.txt"),
        ("train", ["--json", "/"], "/ is a folder; name a file"),
        ("plan", ["--only", "llama-nonsense"], "invalid choice: 'llama-nonsense'"),
        ("plan", ["--threads", "0"], "must be a whole number from 1 on, got 0"),
        ("loading", ["--model", "nowhere"], "nowhere is no folder"),
        ("loading", ["--rounds", "0"], "must be a whole number from 1 on, got 0"),
        ("scaling", ["--read", "nowhere.json"], "nowhere.json is no file"),
        ("lora_layer", ["--rounds", "0"], "must be a whole number from 1 on, got 0"),
        ("lora_layer", ["--rank", "half"], "must be a whole number from 1 on, got half"),
        ("loss", ["--tokens", "-5"], "must be a whole number from 1 on, got -5"),
        ("loss", ["--supervised", "0"], "--supervised must be above 0 and at most 1, got 0"),
        ("data", ["--rows", "0"], "must be a whole number from 1 on, got 0"),
        ("qat", ["--tokens", "0"], "must be a whole number from 1 on, got 0"),
    ],
)
def test_what_is_wrong_with_an_option_is_one_message(
    name: str, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(name, *options) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert said in line
