"""`qlora-kit data` from the outside: what it shows, writes, refuses, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data.sequences import IGNORE_INDEX
from qlora_kit.recipe import load_recipe

from .conftest import ROOT, Call, write_recipe, write_rows

QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")

GOOD = {"prompt": "paint the lamp ", "completion": "lamp=red"}
BAD_ROWS = [
    json.dumps(GOOD),
    "not JSON",
    json.dumps({"prompt": "paint the door ", "label": "good"}),
    json.dumps(GOOD),
    json.dumps({"prompt": "x" * 400, "completion": "y", "label": "good"}),
    json.dumps({"prompt": "\x1b[31m<b>", "completion": "<script>alert(1)</script>"}),
]
"""By line: kept, dropped, dropped, a duplicate, too long, kept."""


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> str:
    return str(write_recipe(tmp_path, tiny_llama))


@pytest.fixture
def bad_recipe(tmp_path: Path, recipe: str) -> str:
    (tmp_path / "train.jsonl").write_text("\n".join(BAD_ROWS) + "\n", encoding="utf-8")
    return recipe


def values(call: Call, *arguments: str, code: int = 0) -> Any:
    said = call("data", *arguments, "--json")
    assert said.code == code, said.err
    return json.loads(said.out)


@pytest.mark.demo
def test_the_demo_task(call: Call, tmp_path: Path) -> None:
    lines, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    said = call("data", QUICKSTART, "--export", str(lines), "--html", str(page))
    assert (said.code, said.err) == (0, "")
    for part in (
        "train  demo/commands: messages",
        "eval   demo/commands: messages",
        "Where every token went",
        "max_length 256: no row longer",
        "What packing saves in a pass",
        '⟦{"action":',
        "<|im_end|>⟧↵",
        "example 3 of 3",
    ):
        assert part in said.out, part
    rendered = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [one["part"] for one in rendered] == ["train"] * 576 + ["eval"] * 96
    for one in rendered:
        learned = [label for label in one["labels"] if label != IGNORE_INDEX]
        assert len(one["input_ids"]) == len(one["labels"])
        assert learned == [
            i for i, label in zip(one["input_ids"], one["labels"], strict=True) if label >= 0
        ]
        [answer] = one["supervised"]
        json.loads(answer.removesuffix("<|im_end|>"))
        assert answer in one["text"]
    assert "⟦" not in page.read_text(encoding="utf-8")


def test_figures_are_those_of_the_ledger(call: Call, recipe: str) -> None:
    found = values(call, recipe, "--examples", "2")
    rows = found["train"]["ledger"]["rows"]
    assert rows["read"] == rows["kept"] == sum(one[2] for one in found["train"]["lengths"]["bins"])
    tokens = found["train"]["ledger"]["tokens"]
    assert tokens["rendered"] == tokens["supervised"] + tokens["context"]
    assert found["packing"]["num_tokens"] == tokens["rendered"]
    assert found["packing"]["batch_size"] == 8
    assert found["train"]["fault"] is found["eval"]["fault"] is None
    assert len(found["examples"]) == 2
    for one in found["examples"]:
        assert one["supervised"][0].endswith("<|im_end|>")


def test_it_needs_no_weights_and_renders_what_training_takes(
    call: Call, recipe: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """The tokens are those that `load_base` gives training, and so is the cache entry."""
    import torch

    from qlora_kit.environment import cache_dir, probe_hardware
    from qlora_kit.model.base import load_base
    from qlora_kit.model.tokenizer import tokenizer_hash
    from qlora_kit.model.vocabulary import load_vocabulary

    bare = tmp_path / "bare"
    bare.mkdir()
    for path in tiny_llama.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).symlink_to(path)
    expected = values(call, recipe)
    entries = sorted((cache_dir() / "data").iterdir())
    assert values(call, recipe, f"model.name_or_path={bare}") == expected
    assert sorted((cache_dir() / "data").iterdir()) == entries

    spec = load_recipe(recipe)
    base = load_base(spec.model, spec.quantization, torch.float32, "", probe_hardware())
    found = load_vocabulary(spec.model)
    assert (found.stop_ids, found.pad) == (base.stop_ids, base.pad)
    assert tokenizer_hash(found.tokenizer) == tokenizer_hash(base.tokenizer)


@pytest.mark.parametrize(
    ("settings", "stops"),
    [({"eos_token_id": [2, 7]}, {2, 7}), ({"eos_token_id": 9}, {2, 9}), (None, {2, 5})],
)
def test_stop_ids_come_from_the_files(
    tmp_path: Path, tiny_llama: Path, settings: dict[str, Any] | None, stops: set[int]
) -> None:
    from qlora_kit.model.vocabulary import load_vocabulary
    from qlora_kit.recipe import ModelSpec

    for path in tiny_llama.iterdir():
        if path.name not in ("generation_config.json", "config.json"):
            (tmp_path / path.name).symlink_to(path)
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    if settings is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert load_vocabulary(ModelSpec(name_or_path=str(tmp_path))).stop_ids == stops


def test_too_many_bad_rows_are_shown_and_fail(call: Call, bad_recipe: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    said = call("data", bad_recipe, "--html", str(page))
    assert said.code == 1
    assert "dropped: not JSON" in said.out
    assert "set aside: the same as an earlier row" in said.out
    assert "train.jsonl:2" in said.out
    assert f"not read of {tmp_path / 'train.jsonl'}: label" in said.out
    assert "more than the 1.0% allowed" in said.err
    assert "\x1b" not in said.out
    text = page.read_text(encoding="utf-8")
    assert "more than the 1.0% allowed" in text
    assert "; not read: label</li>" in text
    assert "<script" not in text
    found = values(call, bad_recipe, code=1)
    assert found["train"]["ledger"]["rows"]["kept"] == 2
    assert "1.0%" in found["train"]["fault"]
    fine = values(call, bad_recipe, "data.max_dropped_share=0.5")
    assert fine["train"]["fault"] is None


def test_no_row_left_is_shown_and_fails(call: Call, recipe: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"prompt": "x" * 400, "completion": "y"}])
    said = call("data", recipe)
    assert said.code == 1
    assert "dropped: longer than max_length" in said.out
    assert "no row was kept" in said.err


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        (1, "is trained on"),
        (2, "is dropped: not JSON"),
        (3, "is dropped: fits no schema (keys: prompt, label)"),
        (4, "is set aside: the same as an earlier row ({file}:1)"),
        (5, "is dropped: longer than max_length"),
        (6, "is trained on"),
    ],
)
def test_what_became_of_a_row(
    call: Call, bad_recipe: str, tmp_path: Path, line: int, outcome: str
) -> None:
    file = str(tmp_path / "train.jsonl")
    said = call("data", bad_recipe, "--row", f"train.jsonl:{line}")
    assert said.code == 0, said.err
    assert f"train: {file}:{line} {outcome.format(file=file)}" in said.out
    assert ("⟦" in said.out) == (line in (1, 5, 6))
    [fate] = values(call, bad_recipe, "--row", f"{file}:{line}")
    assert f"is {fate['outcome']}".startswith(outcome.format(file=file))
    if line not in (2, 6):
        assert json.loads(fate["record"]) == json.loads(BAD_ROWS[line - 1])


def test_a_row_shows_what_should_be_known_of_it(call: Call, recipe: str, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    write_rows(file, [{"prompt": "paint the lamp ", "completion": "None"}])
    said = call("data", recipe, "--row", f"{file}:1")
    assert "note: a whole text is None, nan, null or the like" in said.out


def test_a_row_agrees_with_what_is_prepared(call: Call, recipe: str) -> None:
    """Of every row of the task, held out or not."""
    file = load_recipe(recipe).data.train[0].path
    drawn = ["data.eval=[]", "data.held_out=5"]
    found = values(call, recipe, *drawn, "--examples", "99")
    trained = {one["origin"]: one["text"] for one in found["examples"]}
    num_evaluated = 0
    for number in (1, 2, 3, 20, 47, 48):
        train, held_out = values(call, recipe, *drawn, "--row", f"{file}:{number}")
        assert (train["outcome"] == "trained on") == (f"{file}:{number}" in trained)
        assert (train["outcome"] == "trained on") != (held_out["outcome"] == "evaluated")
        if train["outcome"] == "trained on":
            assert train["sequences"][0]["text"] == trained[f"{file}:{number}"]
        num_evaluated += held_out["outcome"] == "evaluated"
    assert num_evaluated < 6


def test_a_row_that_is_split_or_cut(call: Call, recipe: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"prompt": "ab", "completion": "y" * 300}])
    [fate] = values(call, recipe, "data.overlength=split", "--row", "train.jsonl:1")
    assert fate["outcome"] == f"trained on, split into {len(fate['sequences'])} sequences"
    assert len(fate["sequences"]) > 2
    [fate] = values(call, recipe, "data.overlength=truncate", "--row", "train.jsonl:1")
    assert fate["outcome"].startswith("trained on, truncated from ")
    assert fate["sequences"][0]["num_tokens"] == 96


def test_a_preview_can_be_made_once_more_only_by_force(
    call: Call, recipe: str, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for option in ("--html", "--export"):
        said = call("data", recipe, option, str(mine))
        assert (said.code, mine.read_text()) == (1, "mine")
        assert "--force" in said.err
    assert call("data", recipe, "--export", str(mine), "--force").code == 0
    assert mine.read_text() != "mine"
    assert call("data", recipe, "--export", str(tmp_path)).code == 1
    said = call("data", recipe, "--export", str(tmp_path / "no" / "where.jsonl"))
    assert said.code == 1
    assert "cannot be written" in said.err
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "options",
    [
        ["--row", "train.jsonl"],
        ["--row", "train.jsonl:first"],
        ["--row", ":3"],
        ["--row", "train.jsonl:1", "--html", "page.html"],
        ["--examples", "-1"],
    ],
)
def test_bad_usage(call: Call, recipe: str, options: list[str]) -> None:
    assert call("data", recipe, *options).code == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [("other.jsonl:1", "is no file that this recipe reads"), ("train.jsonl:4711", "no row 4711")],
)
def test_a_row_that_is_not_there(call: Call, recipe: str, row: str, message: str) -> None:
    said = call("data", recipe, "--row", row)
    assert said.code == 1
    assert message in said.err


SHARED: dict[str, tuple[str, list[str], int, str]] = {
    "snips": ("snips/intent_train.jsonl", [], 3987, "messages"),
    "banking77": ("banking77/train.csv", [], 10003, "label"),
    "fastchat": ("fastchat/dummy_conversation.json", [], 500, "sharegpt"),
    "zh": ("zh/alpaca_zh_demo.json", [], 992, "alpaca"),
    "preference": (
        "preference/dpo_en_demo.json",
        ["data.max_length=8192"],
        294,
        "preference",
    ),
    "self-instruct": (
        "self-instruct/seed_tasks.jsonl",
        [
            "data.train.0.columns={instruction: instruction, input: instances.0.input, "
            "output: instances.0.output}"
        ],
        175,
        "alpaca",
    ),
    "wikitext": ("wikitext-2/valid.txt", [], 1, "text"),
    "bfcl": (
        "bfcl/BFCL_v4_simple_python.json",
        [
            "data.train.0.columns={messages: question.0, tools: function}",
            "model.chat_template=chatml-tools",
            "data.loss_on=all",
        ],
        400,
        "messages",
    ),
}
"""File → overrides, rows kept, schema."""


@pytest.mark.demo
@pytest.mark.parametrize("name", list(SHARED))
def test_real_data(call: Call, shared_data: Path, tmp_path: Path, name: str) -> None:
    file, overrides, num_kept, schema = SHARED[name]
    recipe = tmp_path / "recipe.yaml"
    text = {
        "model": {"name_or_path": "demo/smollm2-135m-instruct"},
        "data": {
            "train": [{"path": str(shared_data / file)}],
            "max_length": 2048,
            "max_dropped_share": 0.02,
        },
    }
    recipe.write_text(json.dumps(text))
    found = values(call, str(recipe), "run_dir=runs/x", *overrides)
    [described] = found["train"]["schemas"].values()
    assert described.startswith(f"{schema}:")
    assert found["train"]["ledger"]["rows"]["kept"] == num_kept
    assert found["train"]["ledger"]["tokens"]["supervised"] > num_kept
    assert found["packing"]["num_packed"] <= found["packing"]["num_sequences"]
    assert all(one["supervised"] for one in found["examples"])
