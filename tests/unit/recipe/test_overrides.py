"""`key.sub=value`: where it reaches, and what it says where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.errors import RecipeError
from qlora_kit.recipe import Recipe, load_recipe

TEXT = """
model: {name_or_path: some/model}
data: {train: [&s {path: a.jsonl}], eval: [{<<: *s, path: b.jsonl}]}
lora: {r: 4, alpha: 8}
train:
"""


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("lora.r=8", 8),
        (" lora.r = 8 ", 8),
        ("train.learning_rate=2e-4", 2e-4),
        ("run_dir=a=b", "a=b"),
        ("data.train.0.path=rows.jsonl", "rows.jsonl"),
        ("lora.target_modules=[q_proj, v_proj]", ("q_proj", "v_proj")),
        ("evaluate.generate.max_new_tokens=5", 5),
        ("export.merge_options.max_kl=0.5", 0.5),
        ("train.max_steps=", None),
        ("train.tf32=on", True),
        ("train.tf32=null", None),
    ],
)
def test_it_reaches_its_place(override: str, value: object, recipe_path: Path) -> None:
    found: object = load_recipe(recipe_path, [override])
    for part in override.partition("=")[0].strip().split("."):
        found = found[int(part)] if isinstance(found, tuple) else getattr(found, part)
    assert found == value


def test_the_names_in_a_mapping_may_have_dots(recipe_path: Path) -> None:
    recipe = load_recipe(recipe_path, ["lora.rank_pattern.layers.0.q_proj=8"])
    assert recipe.lora.rank_pattern == {"layers.0.q_proj": 8}


def test_a_section_can_be_set_whole_or_back_to_its_defaults(recipe_path: Path) -> None:
    assert load_recipe(recipe_path, ["lora={r: 2}"]).lora.alpha == 32
    assert load_recipe(recipe_path, ["lora="]).lora.r == 16


def test_the_last_of_two_wins(recipe_path: Path) -> None:
    assert load_recipe(recipe_path, ["lora.r=8", "lora.r=9"]).lora.r == 9


def test_what_an_alias_repeats_is_changed_in_one_place(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: [&s {path: a}], eval: [*s]}")
    recipe = load_recipe(path, ["data.eval.0.path=b"])
    assert [recipe.data.train[0].path, recipe.data.eval[0].path] == ["a", "b"]


@pytest.mark.parametrize(
    ("override", "path", "piece"),
    [
        ("lora.r", "", "is not key=value"),
        ("=5", "", "is not key=value"),
        ("lora..r=5", "", "is not key=value"),
        ("lora.r.=5", "", "is not key=value"),
        ("data.train.1.path=x", "data.train.1.path", "has 1 entry"),
        ("data.train.1={path: x}", "data.train.1", "data.train=[…]"),
        ("data.train.-1.path=x", "data.train.-1.path", "as data.train.0"),
        ("data.train.first.path=x", "data.train.first.path", "as data.train.0"),
        ("train.report_to.0=wandb", "train.report_to.0", "has no entries"),
        ("lora.r.x=1", "lora.r.x", "lora.r is 4, which has no parts"),
        ("lora.r=", "lora.r", "got nothing"),
        ("run_dir=", "run_dir", "got nothing"),
        ("model.name_or_path=*x", "model.name_or_path", "override value '*x'"),
        ("lora={r: 1, r: 2}", "lora.r", "already set"),
        ("lora.alhpa=1", "lora.alhpa", "did you mean 'alpha'"),
        ("lorra.r=1", "lorra", "did you mean 'lora'"),
        ("data.train.0.spilt=x", "data.train.0.spilt", "did you mean 'split'"),
    ],
)
def test_where_it_cannot_reach(override: str, path: str, piece: str, recipe_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_path, [override])
    (fault,) = caught.value.faults
    assert fault.path == path
    assert piece in str(fault)


def test_a_bad_override_hides_no_other_fault(recipe_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_path, ["nonsense", "lora.r=0", "data.train.7.path=x", "train.seed=-1"])
    assert len(caught.value.faults) == 4


def test_an_override_leaves_the_file_alone(recipe_path: Path) -> None:
    assert load_recipe(recipe_path, ["lora.r=8"]) != load_recipe(recipe_path)
    assert recipe_path.read_text() == TEXT
    assert isinstance(load_recipe(recipe_path), Recipe)
