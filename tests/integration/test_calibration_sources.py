"""`quantize --calibration RECIPE` with several sources: how many tokens each of them gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import Call, write_recipe, write_rows

TOKENS = 400
STATIC = ("--method", "int8", "activations=static", "--calibration-length", "64")
LONGEST = 64


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Path:
    """60 rows of a word, 60 of twelve, and 4 of three."""
    words = ["lamp", "door", "car", "hat", "cup", "pen", "bag", "box", "key", "ink", "oar", "elm"]

    def rows(count: int, num_words: int, first: int) -> list[dict[str, object]]:
        return [{"text": " ".join([str(first + n), *words[:num_words]])} for n in range(count)]

    sources = {
        "short.jsonl": rows(60, 1, 100),
        "long.jsonl": rows(60, 12, 200),
        "few.jsonl": rows(4, 3, 300),
    }
    train = [{"path": str(write_rows(tmp_path / name, made))} for name, made in sources.items()]
    held_out = write_rows(tmp_path / "held-out.jsonl", rows(8, 5, 400))
    return write_recipe(
        tmp_path / "recipe",
        tiny_llama,
        data={"train": train, "eval": [{"path": str(held_out)}], "max_length": 96},
    )


def drawn(call: Call, model: Path, recipe: Path, out: Path, sampling: str) -> dict[str, Any]:
    """What the certificate says of the calibration, which is what was printed."""
    said = call(
        "quantize", str(model), *STATIC, "--out", str(out), "--calibration", str(recipe),
        "--calibration-tokens", str(TOKENS), "--sampling", sampling,
    )  # fmt: skip
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads((out / "certificate.json").read_text())["calibration"]
    assert " ".join(found["description"].split()) in " ".join(said.out.split())
    record = json.loads((out / "artifact.json").read_text())["calibration"]
    assert found["num_tokens"] == record["num_tokens"] == TOKENS
    assert sum(found["tokens_by_source"].values()) == TOKENS
    for name, number in found["tokens_by_source"].items():
        assert f"{number:,} of {name}" in found["description"]
    return found


def test_sources_and_lengths_are_drawn_evenly(
    recipe: Path, tiny_llama: Path, tmp_path: Path, call: Call
) -> None:
    by_source = drawn(call, tiny_llama, recipe, tmp_path / "s", "by-source")["tokens_by_source"]
    few = by_source["few.jsonl"]  # all that it has, and the others share the rest
    assert 0 < few < TOKENS / 3
    assert abs(by_source["short.jsonl"] - by_source["long.jsonl"]) <= LONGEST
    by_length = drawn(call, tiny_llama, recipe, tmp_path / "l", "by-length")["tokens_by_source"]
    assert abs(by_length["short.jsonl"] - by_length["long.jsonl"]) <= LONGEST + few
    at_random = drawn(call, tiny_llama, recipe, tmp_path / "r", "random")["tokens_by_source"]
    assert at_random["long.jsonl"] > 2 * at_random["short.jsonl"], "it has most of the tokens"
    whole = drawn(call, tiny_llama, recipe, tmp_path / "w", "whole")["tokens_by_source"]
    assert whole["short.jsonl"] > whole["long.jsonl"] > whole["few.jsonl"] == 0
