"""Wrong input to `quantize`, `export` and `sensitivity`: one message, before any weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Call, FinishedRun, task_rows, write_recipe, write_rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Of the task, and none of the run's own, on which the results are compared."""
    return write_rows(tmp_path / "rows.jsonl", [{"text": f"{row} please"} for row in task_rows()])


def never(*_: object, **__: object) -> None:
    pytest.fail("work was begun")


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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qlora_kit.export.sixteen_bit.merge_reopened", never)
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
    ("arguments", "words"),
    [
        (("gptq", "group_size=96"), "group_size=96 does not divide"),
        (("gptq", "group_size=32", "--calibration-tokens", "99999"), "99,999 tokens were asked"),
        (("gptq", "group_size=32", "--calibration", "none.jsonl"), "none.jsonl"),
        (("gguf:Q9",), "Q9"),
        (("tensorrt",), "tensorrt"),
    ],
)
def test_nothing_is_measured_for_an_export_that_cannot_be_made(
    arguments: tuple[str, ...],
    words: str,
    finished: FinishedRun,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qlora_kit.export.export.begin_ledger", never)
    before = sorted(finished.folder.rglob("*"))
    said = call("export", str(finished.folder), "--to", *arguments)
    assert said.code in (1, 2)
    assert words in said.err
    assert "Traceback" not in said.err
    assert sorted(finished.folder.rglob("*")) == before, "something was written"


NUMBERS = [
    *(
        (verb, "--max-kl", number)
        for verb in ("quantize --method nf4", "export --to nf4", "merge", "sensitivity --data x")
        for number in ("-1", "nan", "inf")
    ),
    ("merge", "--max-kl", "0"),
    *(
        (verb, option, number)
        for verb in ("quantize --method gptq", "export --to gptq")
        for option, number in (
            ("--calibration-tokens", "0"),
            ("--calibration-tokens", "1"),
            ("--seed", "-1"),
            ("--seed", str(2**32)),
        )
    ),
    ("sensitivity --data x", "--seed", str(2**64)),
]


@pytest.mark.parametrize(("verb", "option", "number"), NUMBERS)
def test_numbers_that_mean_nothing_are_refused_as_they_are_read(
    verb: str, option: str, number: str, tmp_path: Path, call: Call
) -> None:
    name, *others = verb.split()
    out = ("--out", str(tmp_path / "out"))
    said = call(name, str(tmp_path / "model"), *others, *out, option, number)
    assert said.code == 2, said.err
    assert f"Invalid value for '{option}': " in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "--method", "int8", "activations=static", "--calibration", "{none}"),
        ("quantize", "--method", "nf4", "--data", "{none}"),
        ("sensitivity", "--data", "{none}"),
        ("export", "--to", "nf4", "--data", "{none}"),
        ("merge", "--data", "{none}"),
    ],
)
def test_text_that_is_not_there_is_told_without_the_model(
    arguments: tuple[str, ...],
    finished: FinishedRun,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for place in ("quantize.quantize.open_source", "quantize.sensitivity.run.load_reference"):
        monkeypatch.setattr(f"qlora_kit.{place}", never)
    monkeypatch.setattr("qlora_kit.export.reopen.load_base", never)
    verb, *others = (one.format(none=tmp_path / "none.jsonl") for one in arguments)
    out = ("--out", str(tmp_path / "out"))
    said = call(verb, str(finished.folder), *out, *others)
    assert said.code == 1
    assert "none.jsonl" in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_eval_rows_that_are_not_there_are_told_without_the_model(
    verb: str,
    tiny_llama: Path,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qlora_kit.runtime.open.open_runtime", never)
    monkeypatch.setattr("qlora_kit.evaluate.compare.measure_apart", never)
    recipe = write_recipe(tmp_path, tiny_llama)
    (tmp_path / "held-out.jsonl").unlink()
    others = (str(tiny_llama),) if verb == "compare" else ()
    said = call(verb, str(tiny_llama), *others, "--recipe", str(recipe))
    assert said.code == 1
    assert "held-out.jsonl" in said.err
