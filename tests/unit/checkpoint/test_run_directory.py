"""Who may write into a run's folder, and what is found there again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_kit.checkpoint.lock import hold
from qlora_kit.checkpoint.run_directory import (
    RunDirectory,
    create_run,
    finished_run,
    fresh_folder,
    is_run,
    open_run,
    require_free,
    write_json,
)
from qlora_kit.errors import RunError
from qlora_kit.recipe import Recipe, load_recipe, recipe_from_dict


def recipe_in(folder: Path, **train: object) -> Recipe:
    return recipe_from_dict(
        {
            "model": {"name_or_path": "demo/smollm2-135m-instruct"},
            "data": {"train": [{"path": "demo/commands"}]},
            "train": train,
            "run_dir": str(folder),
        },
        "test",
    )


def test_a_new_run_holds_its_recipe_and_environment(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "runs" / "one", max_steps=3)
    run = create_run(recipe)
    assert load_recipe(run.recipe) == recipe
    environment = json.loads(run.environment.read_text())
    assert environment["packages"]["torch"]
    assert environment["seed"] == recipe.train.seed
    assert len(environment["recipe_sha256"]) == 64
    assert is_run(run.folder)
    assert not run.is_finished


@pytest.mark.parametrize(
    ("left_there", "said"),
    [
        (["recipe.yaml"], "a run that was not finished"),
        (["recipe.yaml", "summary.json"], "a finished run"),
        (["notes.txt"], "holds no run"),
    ],
)
def test_a_folder_in_use_is_refused_and_untouched(
    tmp_path: Path, left_there: list[str], said: str
) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    for name in left_there:
        (folder / name).write_text("{}")
    with pytest.raises(RunError, match=said) as error:
        create_run(recipe_in(folder))
    assert "one-2" in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == sorted(left_there)
    assert all((folder / name).read_text() == "{}" for name in left_there)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("mine")
    with pytest.raises(RunError, match="one is a file"):
        create_run(recipe_in(tmp_path / "one"))
    with pytest.raises(RunError, match="cannot be made"):
        create_run(recipe_in(tmp_path / "one" / "below"))


def test_only_the_same_recipe_finds_its_finished_run(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "one", max_steps=3)
    run = create_run(recipe)
    assert finished_run(recipe) is None
    write_json(run.summary, {"holds": True})
    assert finished_run(recipe) == run
    assert finished_run(recipe_in(tmp_path / "one", max_steps=4)) is None
    assert finished_run(recipe_in(tmp_path / "one", max_steps=3, optim="sgd")) is None


def test_auto_finds_the_run_of_whatever_optimizer(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "one")
    run = create_run(recipe.with_optimizer("paged_adamw_8bit"))
    write_json(run.summary, {"holds": True})
    assert finished_run(recipe) == run
    assert finished_run(recipe.with_optimizer("adamw_torch_fused")) is None


def test_fresh_folders_count_upwards(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "one")
    (tmp_path / "one").mkdir()
    assert fresh_folder(recipe) == str(tmp_path / "one-2")
    (tmp_path / "one-2").mkdir()
    assert fresh_folder(recipe) == str(tmp_path / "one-3")


def test_opening_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        open_run(tmp_path / "none")
    with pytest.raises(RunError, match="not a run"):
        open_run(tmp_path)
    run = create_run(recipe_in(tmp_path / "one"))
    with pytest.raises(RunError, match="has no adapter: its training did not end"):
        open_run(run.folder)
    run.adapter.mkdir()
    assert open_run(run.folder)[0] == RunDirectory(run.folder)


def test_the_lock_of_the_process_that_asks_is_nobodys_run(tmp_path: Path) -> None:
    with hold(tmp_path / "one", print):
        require_free(recipe_in(tmp_path / "one"))
        create_run(recipe_in(tmp_path / "one"))
        with pytest.raises(RunError, match="already holds a run that was not finished"):
            require_free(recipe_in(tmp_path / "one"))


def test_a_run_that_was_half_begun_is_begun(tmp_path: Path) -> None:
    """Killed before the recipe was in place: whatever is there is nobody's run."""
    recipe = recipe_in(tmp_path / "one")
    run = create_run(recipe)
    run.recipe.rename(run.folder / ".recipe.yaml.123")
    (run.folder / ".environment.json.123").write_text("{")
    require_free(recipe)
    assert load_recipe(create_run(recipe).recipe) == recipe


def test_json_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "values.json"
    write_json(target, {"a": 1})
    with pytest.raises(TypeError):
        write_json(target, {"a": object()})
    assert json.loads(target.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["values.json"]
