"""Loading, saving, hashing: a recipe that is written out is the same recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import annotated_types
import pydantic
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from qlora_kit.errors import RecipeError
from qlora_kit.recipe import Recipe, load_recipe, recipe_from_dict, recipe_hash, save_recipe, shape
from qlora_kit.recipe.base import Spec
from qlora_kit.recipe.yaml import dump_yaml

MINIMAL: dict[str, Any] = {
    "model": {"name_or_path": "some/model"},
    "data": {"train": [{"path": "a.jsonl"}], "eval": [{"path": "b.jsonl"}]},
}

RARE: dict[str, Any] = {
    "quantization": {"load_in_4bit": False},
    "quantization_aware": {"method": "int4-group", "group_size": 32},
}
"""What other fields have to agree with, which few drawn recipes come to."""

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8) | (
    st.sampled_from(["1e5", "no", "2024-01-01", "12:30", "null", "num_cycles", "a/b", " x "])
)


def values_of(annotation: Any, limits: list[Any]) -> st.SearchStrategy[Any]:
    """Plain values for a field, as a YAML file would hold them."""
    members = shape.members(annotation)
    if len(members) > 1:
        return st.one_of([values_of(member, limits) for member in members])
    (member,) = members
    inner = get_args(member)
    kind = shape.kind(member)
    if shape.is_spec(member):
        return sections(member)
    if kind is Literal:
        return st.sampled_from(inner)
    if kind is tuple:
        return st.lists(values_of(inner[0], []), min_size=1, max_size=2)
    if kind is dict:
        return st.dictionaries(texts, values_of(inner[1], []), max_size=2)
    if kind is str:
        return texts
    if kind is bool:
        return st.booleans()
    low, high = bounds(limits)
    whole = st.integers(int(max(low, 1)), int(high))
    if kind is int:
        return whole
    floats = st.floats(max(low, 1e-9), high * 0.99)
    return floats | whole if high > 1 else floats


def bounds(limits: list[Any]) -> tuple[float, float]:
    low = [limit.ge for limit in limits if isinstance(limit, annotated_types.Ge)]
    high = [limit.le for limit in limits if isinstance(limit, annotated_types.Le)]
    high += [limit.lt for limit in limits if isinstance(limit, annotated_types.Lt)]
    return max(low, default=0), min(high, default=10**9)


def sections(spec: type[Spec]) -> st.SearchStrategy[dict[str, Any]]:
    def field(info: FieldInfo) -> st.SearchStrategy[Any]:
        values = values_of(info.annotation, info.metadata)
        is_optional = type(None) in get_args(info.annotation)
        return values | st.none() if is_optional else values

    required = {n: field(i) for n, i in spec.model_fields.items() if i.is_required()}
    optional = {n: field(i) for n, i in spec.model_fields.items() if not i.is_required()}
    some = st.fixed_dictionaries(required, optional=optional)
    return st.fixed_dictionaries(required | optional) | some


def without(values: dict[str, Any], path: str) -> None:
    """Remove what a fault is about: the key it names, or what needs it where that is not set."""
    parts = path.split(".")
    needed_by = {"eval_steps": "eval_strategy", "lr_scheduler_kwargs": "lr_scheduler_type"}
    place: Any = values
    for part in parts[:-1]:
        inner = place[int(part)] if isinstance(place, list | tuple) else place.get(part)
        if not isinstance(inner, dict | list | tuple):
            break
        place = inner
    key = parts[-1]
    if isinstance(place, dict) and key in place and key not in ("train", "eval"):
        del place[key]
    elif isinstance(place, dict) and needed_by.get(key) in place:
        del place[needed_by[key]]
    elif parts[0] in ("data", "model"):
        values[parts[0]] = MINIMAL[parts[0]]
    elif path == "train.max_steps":
        values["data"]["streaming"] = False
    else:
        del values[parts[0]]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Valid recipes: any values of the right kind, less those that contradict each other."""
    values = draw(sections(Recipe))
    for _ in range(30):
        try:
            return recipe_from_dict(values, "generated")
        except RecipeError as error:
            for fault in error.faults:
                with suppress(KeyError, IndexError):  # an earlier one has taken it along
                    without(values, fault.path)
    raise AssertionError(f"never becomes valid: {values}")


def test_a_saved_recipe_loads_as_an_equal_one(tmp_path: Path) -> None:
    """Over generated recipes that between them set every field there is."""
    path = tmp_path / "other-name.yaml"
    fields_set: set[str] = set()

    @given(recipes())
    @example(recipe_from_dict(MINIMAL | RARE, "rare"))
    @settings(max_examples=350, deadline=None, derandomize=True, database=None)
    def check(recipe: Recipe) -> None:
        save_recipe(recipe, path)
        text = path.read_text()
        loaded = load_recipe(path)
        assert loaded == recipe
        assert recipe_hash(loaded) == recipe_hash(recipe)
        save_recipe(loaded, path)
        assert path.read_text() == text
        fields_set.update(set_in(recipe))

    check()
    assert {name for name in shape.all_paths() if ".0." not in name} - fields_set == set()


def set_in(spec: Spec, prefix: str = "") -> Iterator[str]:
    for name in spec.model_fields_set:
        yield prefix + name
        value = getattr(spec, name)
        if isinstance(value, Spec):
            yield from set_in(value, f"{prefix}{name}.")


def test_a_resolved_recipe_has_every_default_written_out(tmp_path: Path) -> None:
    save_recipe(recipe_from_dict(MINIMAL, "x"), tmp_path / "r.yaml")
    text = (tmp_path / "r.yaml").read_text()
    missing = [path for path in shape.all_paths() if f"{path.rpartition('.')[2]}:" not in text]
    unset = ("evaluate.generate.", "quantization_aware.")
    assert [path for path in missing if not path.startswith(unset)] == []


def test_the_hash_knows_the_recipe_and_not_the_place_it_runs_in() -> None:
    recipe = recipe_from_dict(MINIMAL, "x")
    reordered = json.loads(json.dumps(dict(reversed(MINIMAL.items()))))
    spelled_out = {**MINIMAL, "lora": {"alpha": 32, "r": 16}, "train": None}
    elsewhere = {**MINIMAL, "run_dir": "runs/other"}
    for same in (reordered, spelled_out, elsewhere):
        assert recipe_hash(recipe_from_dict(same, "y")) == recipe_hash(recipe)
    other = recipe_from_dict({**MINIMAL, "lora": {"r": 8}}, "x")
    assert recipe_hash(other) != recipe_hash(recipe)


def test_a_whole_default_of_a_number_is_a_float() -> None:
    """As it is when written out; else the two would have different hashes."""

    class Example(Spec):
        share: float = 3

    assert type(Example().share) is float


def test_the_order_of_a_mapping_does_not_change_the_hash() -> None:
    one = recipe_from_dict({**MINIMAL, "lora": {"rank_pattern": {"a": 1, "b": 2}}}, "x")
    two = recipe_from_dict({**MINIMAL, "lora": {"rank_pattern": {"b": 2, "a": 1}}}, "x")
    assert recipe_hash(one) == recipe_hash(two)


def test_run_dir_is_named_after_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my-task.yaml"
    path.write_text(dump_yaml(MINIMAL))
    assert load_recipe(path).run_dir == "runs/my-task"
    assert load_recipe(path, ["run_dir=runs/x"]).run_dir == "runs/x"
    assert recipe_from_dict(MINIMAL, "x").run_dir == "runs/recipe"


def test_five_lines_are_enough_and_empty_sections_are_defaults(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(dump_yaml(MINIMAL) + "lora:\ntrain:\nexport: {merge_options: }\nevaluate:\n")
    recipe = load_recipe(path)
    assert recipe == load_recipe(path, ["lora={}"])
    assert recipe.lora.r == 16
    assert recipe.evaluate.generate is None


def test_eight_bits_alone_replace_four() -> None:
    recipe = recipe_from_dict({**MINIMAL, "quantization": {"load_in_8bit": True}}, "x")
    assert recipe.quantization.num_bits == 8
    assert not recipe.quantization.load_in_4bit


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + dump_yaml(MINIMAL).encode())
    assert load_recipe(path).model.name_or_path == "some/model"


def test_a_recipe_is_frozen() -> None:
    recipe = recipe_from_dict(MINIMAL, "x")
    with pytest.raises(pydantic.ValidationError):
        recipe.run_dir = "elsewhere"  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError):
        recipe.lora.r = 1  # type: ignore[misc]


def test_the_callers_values_stay_as_they_are() -> None:
    values = {**MINIMAL, "lora": None}
    recipe_from_dict(values, "x")
    assert values == {**MINIMAL, "lora": None}


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("x")
    for name in ("quikstart.yaml", "quickstart"):
        with pytest.raises(RecipeError, match=r"no such file.*did you mean .*quickstart\.yaml"):
            load_recipe(tmp_path / name)
    with pytest.raises(RecipeError, match=r"is a folder.*quickstart\.yaml"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="qlora-kit recipes"):
        load_recipe(tmp_path / "nowhere" / "x.yaml")


@pytest.mark.parametrize("module", ["qlora_kit.recipe", "qlora_kit.recipe.schema"])
def test_reading_recipes_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
