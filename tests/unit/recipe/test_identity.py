"""The hash of a recipe outlives new fields and changed defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, create_model

from qlora_kit.checkpoint.drift import Drift, compare
from qlora_kit.recipe import (
    GenerateSpec,
    Recipe,
    SourceSpec,
    TrainSpec,
    load_written_out,
    recipe_from_dict,
    recipe_hash,
    save_recipe,
)
from qlora_kit.recipe.identity import FIRST_DEFAULTS

MINIMAL: dict[str, Any] = {
    "model": {"name_or_path": "demo/smollm2-135m-instruct"},
    "data": {
        "train": [{"path": "a.jsonl"}],
        "eval": [{"path": "b.jsonl", "columns": {"text": "body"}}],
    },
    "evaluate": {"generate": {"max_rows": 5}},
    "train": {"seed": 1},
}
GOLDEN = Path(__file__).with_name("every_field.yaml")
GOLDEN_SHA256 = "63c9fffeb3e3bc8dadf8ce075825bbe65b0bd5c85f9ec0bef514d5d1bcd14d53"


def with_a_field(spec: type[Any], **fields: Any) -> type[Any]:
    return create_model(spec.__name__, __base__=spec, **fields)


def newer_recipe() -> type[Recipe]:
    """Of a version with one more field in a section, in a list of them and in one that may lack,
    and with one more section.
    """
    source = with_a_field(SourceSpec, shuffle=(bool, False))
    train = with_a_field(TrainSpec, new_field=(int, 7), others=(dict[str, int], Field({"a": 1})))
    generate = with_a_field(GenerateSpec, temperature=(float, 0.0))
    data = Recipe.model_fields["data"].annotation
    evaluate = Recipe.model_fields["evaluate"].annotation
    assert data is not None
    assert evaluate is not None
    evaluate = with_a_field(evaluate, generate=(generate | None, None))
    return with_a_field(
        Recipe,
        data=(with_a_field(data, train=(tuple[source, ...], ...)), ...),
        evaluate=(evaluate, evaluate()),
        train=(train, train()),
        extra=(train, train()),
        other=(train | None, None),
    )


def test_new_fields_at_their_defaults_change_neither_hash_nor_run() -> None:
    old = recipe_from_dict(MINIMAL, "x")
    newer = newer_recipe()
    saved = newer.model_validate(old.model_dump(mode="json"))
    assert "new_field" in saved.model_dump()["train"]
    assert recipe_hash(saved) == recipe_hash(old)
    assert compare(saved, newer.model_validate(MINIMAL)) == Drift()


def test_new_fields_that_are_set_change_both() -> None:
    newer = newer_recipe()
    saved = newer.model_validate(MINIMAL)
    for section, values in (
        ("train", {"seed": 1, "new_field": 8}),
        ("train", {"seed": 1, "others": {}}),
        ("evaluate", {"generate": {"max_rows": 5, "temperature": 0.5}}),
        ("data", {**MINIMAL["data"], "train": [{"path": "a.jsonl", "shuffle": True}]}),
        ("extra", {"seed": 3}),
        ("other", {}),
    ):
        now = newer.model_validate({**MINIMAL, section: values})
        assert recipe_hash(now) != recipe_hash(saved), section
        assert compare(saved, now) != Drift(), section


def test_a_section_of_defaults_is_not_a_section_that_lacks() -> None:
    with_answers = recipe_from_dict({**MINIMAL, "evaluate": {"generate": {}}}, "x")
    without = recipe_from_dict({**MINIMAL, "evaluate": {}}, "x")
    assert recipe_hash(with_answers) != recipe_hash(without)


def test_a_changed_default_is_left_out_as_it_was_first() -> None:
    newer = with_a_field(Recipe, train=(train := with_a_field(TrainSpec, seed=(int, 7)), train()))
    values = {**MINIMAL, "train": {}}
    old = recipe_from_dict(values, "x")
    first = {**FIRST_DEFAULTS, "train.seed": 42}
    spelled_out = newer.model_validate(old.model_dump(mode="json"))
    assert recipe_hash(spelled_out, first) == recipe_hash(old)
    left_to_it = newer.model_validate(values)
    assert recipe_hash(left_to_it, first) != recipe_hash(old)
    (change,) = compare(spelled_out, left_to_it).breaking
    assert change.difference == "train.seed: 42 → 7"


def test_a_default_that_changed_is_noted() -> None:
    """If this fails, a default was changed or a field removed: note the old default in
    `recipe/identity.py` (FIRST_DEFAULTS), and leave this file as it is.
    """
    assert recipe_hash(load_written_out(GOLDEN)) == GOLDEN_SHA256


def test_a_record_without_a_field_means_what_was_done_before_there_was_one(tmp_path: Path) -> None:
    """And a recipe of today's that leaves it out asks for something else."""
    now = recipe_from_dict({**MINIMAL, "quantization": {"quant_type": "fp4"}}, "x")
    assert now.quantization.upcast_norms == "auto"
    save_recipe(now, tmp_path / "new.yaml")
    assert load_written_out(tmp_path / "new.yaml") == now
    spelled_out = now.model_dump(mode="json")
    del spelled_out["quantization"]["upcast_norms"]
    (tmp_path / "old.yaml").write_text(json.dumps(spelled_out))
    before = load_written_out(tmp_path / "old.yaml")
    assert before.quantization.upcast_norms is True
    assert before.quantization.quant_type == "fp4"
    (change,) = compare(before, now).breaking
    assert change.difference == "quantization.upcast_norms: true → auto"
