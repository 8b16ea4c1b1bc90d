"""`evaluate`: what a model is worth, and with --speed what it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlora_kit.cli import app


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("turn the kitchen lamp to 30 percent, please. " * 20)
    return file


def evaluate(model: Path, *words: str) -> tuple[int, str]:
    ended = CliRunner().invoke(app, ["evaluate", str(model), *words])
    said = ended.stdout if "--json" in words else ended.output + ended.stderr
    return ended.exit_code, " ".join(said.replace("│", " ").split())


def test_speed_is_what_compare_measures(tiny_llama: Path, text: Path) -> None:
    words = ("--text", str(text), "--window", "64", "--json")
    code, said = evaluate(tiny_llama, *words, "--speed")
    assert code == 0
    found = json.loads(said)
    cost = found.pop("cost")
    assert cost["runtime"] == "transformers"
    assert cost["footprint"]["parameters"] == {"float32": cost["footprint"]["num_parameters"]}
    assert cost["footprint"]["disk_bytes"] > cost["footprint"]["memory_bytes"] / 2 > 0
    assert cost["peak_bytes"] > cost["idle_bytes"] > 0
    assert cost["load_seconds"] > 0
    assert cost["speed"]["prefill"]["median"] > 0
    assert cost["speed"]["decode"]["count"] == 5
    code, said = evaluate(tiny_llama, *words)
    assert code == 0
    without = json.loads(said)
    for values in (found, without):
        values["model"].pop("seconds")
    assert without == found, "--json without --speed is what it was"


def test_it_is_shown_as_compare_shows_it(tiny_llama: Path, text: Path) -> None:
    code, said = evaluate(tiny_llama, "--text", str(text), "--window", "64", "--speed")
    assert code == 0, said
    for column in ("kept as", "disk MiB", "peak MiB", "load s", "prefill tokens/s", "perplexity"):
        assert column in said
    assert "100% float32" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--speed",), "--text FILE"),
        (("--text", "{text}", "train.seed=1"), "--text stands for a recipe"),
        (("--text", "no-such.txt"), "no-such.txt does not exist"),
        (("--text", "{text}", "--tasks", "arc_easy"), "leave recipe and text out"),
        (("--speed", "--tasks", "arc_easy"), "leave --tasks out"),
        (("--text", "{text}", "--window", "5000"), "(--window, for a text) to"),
    ],
)
def test_bad_input_is_told(words: tuple[str, ...], said: str, tiny_llama: Path, text: Path) -> None:
    ended = CliRunner().invoke(
        app, ["evaluate", str(tiny_llama), *(word.format(text=text) for word in words)]
    )
    assert ended.exit_code != 0
    told = ended.output + ended.stderr + str(ended.exception)
    assert said in " ".join(told.replace("│", " ").split())
