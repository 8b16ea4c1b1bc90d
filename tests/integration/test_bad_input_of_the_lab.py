"""Wrong input to `quantize`, `export` and `sensitivity`: one message, before any weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Call, FinishedRun, task_rows, write_rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", task_rows())


@pytest.fixture
def no_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(*_: object, **__: object) -> None:
        pytest.fail("it was merged first")

    monkeypatch.setattr("qlora_kit.export.sixteen_bit.merge_reopened", merge)


@pytest.mark.usefixtures("no_merge")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gptq", "--calibration", "{rows}", "group_size=96"), "group_size=96 does not divide"),
        (("int8", "granularity=group", "group_size=48"), "group_size=48"),
        (("nf4", "skip_modules=[nowhere]"), "nowhere"),
        (
            (
                "gptq",
                "group_size=32",
                "--calibration",
                "{rows}",
                "--calibration-length",
                "64",
                "--calibration-tokens",
                "99999",
            ),
            "99,999 tokens were asked",
        ),
        (
            ("gptq", "group_size=32", "--calibration", "{rows}", "--calibration-length", "999"),
            "--calibration-length 256",
        ),
    ],
)
def test_a_run_is_not_merged_for_what_cannot_be_made(
    arguments: tuple[str, ...],
    words: str,
    finished: FinishedRun,
    rows: Path,
    tmp_path: Path,
    call: Call,
) -> None:
    method, *others = (one.format(rows=rows) for one in arguments)
    before = sorted(tmp_path.rglob("*"))
    out = str(tmp_path / "out")
    said = call("quantize", str(finished.folder), "--method", method, "--out", out, *others)
    assert said.code == 1
    assert said.err.count("error: ") == 1
    assert words in said.err
    assert "Traceback" not in said.err
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "--method", "int8", "activations=static", "--calibration", "{none}"),
        ("quantize", "--method", "nf4", "--data", "{none}"),
        ("sensitivity", "--data", "{none}"),
    ],
)
def test_text_that_is_not_there_is_told_without_the_model(
    arguments: tuple[str, ...],
    finished: FinishedRun,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def open_source(*_: object, **__: object) -> None:
        pytest.fail("the model was opened first")

    for place in (
        "qlora_kit.quantize.quantize.open_source",
        "qlora_kit.export.sixteen_bit.reopen_adapter",
        "qlora_kit.quantize.sensitivity.run.load_reference",
    ):
        monkeypatch.setattr(place, open_source)
    verb, *others = (one.format(none=tmp_path / "none.jsonl") for one in arguments)
    out = ("--out", str(tmp_path / "out"))
    said = call(verb, str(finished.folder), *out, *others)
    assert said.code == 1
    assert "none.jsonl" in said.err
    assert not list(tmp_path.iterdir())
