"""One folder per run: what is in it, and who may write there."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qlora_kit.checkpoint.checkpoints import Found, find_checkpoints, is_half_written
from qlora_kit.checkpoint.drift import compare
from qlora_kit.checkpoint.lock import LOCK_FILE
from qlora_kit.checkpoint.manifest import faults_at_a_glance
from qlora_kit.errors import RecipeError, RunError
from qlora_kit.recipe import Recipe, load_written_out, recipe_hash, save_recipe
from qlora_kit.refusals import naming
from qlora_kit.versions import describe

OPTIMIZER_FILE = "optimizer.safetensors"  # of a checkpoint
RECIPE_RECORD = "checkpoint_recipe.yaml"  # of a checkpoint
_MAX_DIFFERENCES = 20


@dataclass(frozen=True)
class RunDirectory:
    """Names of everything that a run leaves behind."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.folder / "environment.json"

    @property
    def ledger(self) -> Path:
        return self.folder / "data" / "ledger.json"

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation.json"

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    @property
    def exports(self) -> Path:
        return self.folder / "exports"

    @property
    def quantized(self) -> Path:
        """What a training that was aware of quantization is shipped as."""
        return self.folder / "quantized"

    @property
    def shipped(self) -> Path:
        """The model that was certified."""
        return self.quantized if self.quantized.exists() else self.merged

    @property
    def last_good(self) -> Path:
        return self.folder / "last-good"

    @property
    def is_finished(self) -> bool:
        return self.read_summary() is not None

    def read_summary(self) -> dict[str, Any] | None:
        """What a finished run has come to; None where there is none, or not whole."""
        try:
            values = json.loads(self.summary.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return values if isinstance(values, dict) else None

    def read_recipe(self) -> Recipe | None:
        """The recipe of the run; None where it is gone or cannot be read."""
        try:
            return load_written_out(self.recipe)
        except RecipeError:
            return None


def require_free(recipe: Recipe) -> None:
    """Raises RunError where the recipe's folder holds anything; asked before the work begins.

    What a process leaves that was killed while it made the folder is nothing.
    """
    run = RunDirectory(Path(recipe.run_dir))
    if not run.folder.exists():
        return
    if not run.folder.is_dir():
        other = f"`run_dir={fresh_folder(recipe)}`"
        raise RunError(f"run_dir {run.folder} is a file; choose another: {other}.")
    if any(not _is_beginning(run, one) for one in run.folder.iterdir()):
        raise RunError(_taken(run, recipe))


def is_begun(run: RunDirectory) -> bool:
    """Whether a run was begun there, even if its recipe has been lost since."""
    return run.recipe.is_file() or bool(find_checkpoints(run.folder))


def _is_beginning(run: RunDirectory, path: Path) -> bool:
    if path == run.ledger.parent:
        return path.is_dir() and not any(path.iterdir())
    return path.name in (LOCK_FILE, run.environment.name) or is_half_written(path)


def create_run(recipe: Recipe) -> RunDirectory:
    """Make the folder and write the resolved recipe and the environment into it.

    Raises:
        RunError: the folder holds another run, or something that is no run.
    """
    require_free(recipe)
    run = RunDirectory(Path(recipe.run_dir))
    try:
        run.ledger.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"run_dir {run.folder} cannot be made: {error.strerror}.") from None
    write_json(
        run.environment,
        {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "recipe_sha256": recipe_hash(recipe),
            "seed": recipe.train.seed,
            **describe(),
        },
    )
    save_recipe(recipe, run.recipe)  # last: its presence makes the folder a run
    return run


def finished_run(recipe: Recipe) -> RunDirectory | None:
    """The run of this very recipe, where it is there and finished."""
    run = RunDirectory(Path(recipe.run_dir))
    there = run.read_recipe() if run.is_finished else None
    if there is None:
        return None
    asked = recipe.with_optimizer(there.train.optim)
    return run if recipe_hash(there) == recipe_hash(asked) else None


def open_run(folder: Path) -> tuple[RunDirectory, Recipe]:
    """A run that has an adapter, and its recipe.

    Raises:
        RunError: the folder is not there, is no run, or has no adapter yet.
    """
    run = RunDirectory(folder)
    if not folder.is_dir():
        raise RunError(f"{folder} does not exist.")
    recipe = run.read_recipe()
    if recipe is None:
        copy = next((one / RECIPE_RECORD for one in find_checkpoints(folder)), None)
        if copy is not None and copy.is_file():
            raise RunError(f"{folder} has lost its recipe.yaml. Copy {copy} to {run.recipe}.")
        if not run.recipe.is_file():
            raise RunError(f"{folder} is not a run: it has no recipe.yaml.")
        recipe = load_written_out(run.recipe)  # which says what is wrong with it
    if not run.adapter.is_dir():
        raise RunError(f"{folder} has no adapter: its training did not end. {left_behind(recipe)}")
    return run, recipe


def left_behind(recipe: Recipe, needs_change: bool = False) -> str:
    """What a run that did not end has kept, and how it goes on: once something is changed, where
    the same command would only end in the same way.
    """
    run = RunDirectory(Path(recipe.run_dir))
    again = "Changed so, the run goes on" if needs_change else "The same command goes on with it"
    try:
        if not run.recipe.is_file():
            return "Nothing was written."
        kept = [one for one in find_checkpoints(run.folder) if not faults_at_a_glance(one)]
    except OSError as error:
        return f"{run.folder} cannot be read any more ({error.strerror}). {again} once it can."
    if not kept:
        return f"{run.folder} holds no checkpoint yet. {again}, from the first update."
    return f"{run.folder} holds {kept[0].name}. {again} from there."


def is_run(folder: Path) -> bool:
    """llmcompressor leaves a recipe.yaml of its own, beside a model's config.json."""
    return (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file()


def fresh_folder(recipe: Recipe) -> str:
    """A folder beside the recipe's own that is free: runs/x-2, runs/x-3, …"""
    wanted = Path(recipe.run_dir)
    number = 2
    while (free := wanted.with_name(f"{wanted.name}-{number}")).exists():
        number += 1
    return str(free)


def write_json(path: Path, values: Any) -> None:
    """Write beside the final place, flush, then rename: nobody ever meets half a file, not even
    after a power failure.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            with scratch.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def without_recipe(run: RunDirectory, recipe: Recipe, found: Found | None = None) -> str:
    """Why a run cannot be gone on with that has lost its recipe, what is there, and what to do."""
    told = {folder.name: f" ({faults[0]})" for folder, faults in (found.damaged if found else ())}
    listed = ", ".join(name + told.get(name, "") for name in _left_by_a_run(run))
    how = "cannot be read" if run.recipe.exists() else "is gone"
    return (
        f"run_dir {run.folder} holds what a run has left ({listed}), but its recipe.yaml {how}, "
        "and no whole checkpoint holds a copy. None of that was touched. Put recipe.yaml back to "
        f"go on, train into a new folder with --fresh, or choose one: {_free(recipe)}."
    )


def _left_by_a_run(run: RunDirectory) -> list[str]:
    """Names of what only a run leaves in a folder."""
    places = (run.adapter, run.last_good, run.log, run.summary, run.ledger, run.evaluation)
    kept = [folder.name for folder in find_checkpoints(run.folder)]
    return kept + [str(one.relative_to(run.folder)) for one in places if one.exists()]


def _free(recipe: Recipe) -> str:
    return f"`run_dir={fresh_folder(recipe)}`"


def _taken(run: RunDirectory, recipe: Recipe) -> str:
    if not run.recipe.is_file() and not run.is_finished:
        if _left_by_a_run(run):
            return without_recipe(run, recipe)
        return (
            f"run_dir {run.folder} is not empty and holds no run; choose another: {_free(recipe)}."
        )
    how = "a run that was not finished"
    if run.is_finished:
        how = "a finished run" + _how_it_differs(run, recipe)
    return (
        f"run_dir {run.folder} already holds {how}. Nothing there was touched. Train into "
        f"a new folder with --fresh, or choose one: {_free(recipe)}."
    )


def _how_it_differs(run: RunDirectory, recipe: Recipe) -> str:
    """A finished run's recipe from the one given, field by field; empty where that is lost."""
    copies = [folder / RECIPE_RECORD for folder in find_checkpoints(run.folder)]
    path = next((one for one in (run.recipe, *copies) if one.is_file()), None)
    try:
        there = None if path is None else load_written_out(path)
    except RecipeError:
        there = None
    if there is None:
        return ""
    changes = compare(there, recipe.model_copy(update={"run_dir": there.run_dir})).all
    if not changes:
        return " of this very recipe"
    lines = [f"  - {change.difference}" for change in changes[:_MAX_DIFFERENCES]]
    lines += [f"  - and {len(changes) - len(lines)} more"] * (len(changes) > len(lines))
    return " of another recipe:\n" + "\n".join(lines) + "\nIt is finished as it is"
