"""Entering a run directory: a new run, one to go on with, or one that must be left alone."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.checkpoint.checkpoints import clear_leftovers, find_checkpoints, newest_whole
from qlora_kit.checkpoint.disk import Disk
from qlora_kit.checkpoint.drift import compare
from qlora_kit.checkpoint.lock import hold
from qlora_kit.checkpoint.run_directory import RunDirectory, fresh_folder, require_free
from qlora_kit.errors import RunError
from qlora_kit.recipe import Recipe, load_recipe, save_recipe


@dataclass(frozen=True)
class Entry:
    """What was found in the folder of a run."""

    run: RunDirectory
    is_new: bool
    checkpoint: Path | None = None
    """A whole checkpoint to go on from; None where training begins at the first update."""
    said: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()


def enter(recipe: Recipe, allow_drift: bool, held: ExitStack, disk: Disk) -> Entry:
    """Look at the recipe's folder, which is locked until `held` is left.

    Nothing is written for a new run: `create_run` does so once it can begin.

    Raises:
        RunError: the folder holds something else, a finished run, a run of a recipe that differs
            where it may not, or another process is at work in it.
    """
    run = RunDirectory(Path(recipe.run_dir))
    if not run.recipe.is_file():
        require_free(recipe)
    warned: list[str] = []
    held.enter_context(hold(run.folder, warned.append))
    if not run.recipe.is_file() or run.is_finished:
        require_free(recipe)
        return Entry(run, is_new=True, warned=tuple(warned))
    before = load_recipe(run.recipe)
    clear_leftovers(run.folder, disk)
    found = newest_whole(run.folder)
    warned += [
        f"{folder.name} is damaged ({'; '.join(faults[:3])}) and is set aside as "
        f"{_set_aside(folder, disk)}."
        for folder, faults in found.damaged
    ]
    said = [f"{run.folder} holds a run that did not end."]
    if found.folder is None:
        what = "it holds no whole checkpoint" if warned else "it had written no checkpoint yet"
        said.append(f"resume    {what}: training begins at the first update")
        save_recipe(recipe, run.recipe)
        return Entry(run, False, None, tuple(said), tuple(warned))
    drift = compare(before, recipe)
    if drift.breaking and not allow_drift:
        changes = "\n".join(f"  - {change}" for change in drift.breaking)
        raise RunError(
            f"{run.folder} holds an unfinished run ({found.folder.name}) of a recipe that differs:"
            f"\n{changes}\nNothing there was touched. Undo these changes to go on with it; go on "
            "in spite of them with --allow-drift; or train anew into a new folder with --fresh "
            f"(or run_dir={fresh_folder(recipe)})."
        )
    warned += [f"drift: {change}" for change in drift.breaking]
    said += [f"changed   {change}" for change in drift.accepted]
    said.append(f"resume    {found.folder.name} is whole; training goes on from there")
    if drift.breaking or drift.accepted:
        save_recipe(recipe, run.recipe)
    return Entry(run, False, found.folder, tuple(said), tuple(warned))


def require_same_work(checkpoint: Path, now: Fingerprints, allow_drift: bool) -> tuple[str, ...]:
    """What else than the recipe has changed since a checkpoint was written.

    Raises:
        RunError: anything has, and drift is not allowed.
    """
    changes = tuple(map(str, differences(read_fingerprints(checkpoint), now)))
    if changes and not allow_drift:
        listed = "\n".join(f"  - {change}" for change in changes)
        raise RunError(
            f"{checkpoint} was trained on something else:\n{listed}\nNothing was touched. Restore "
            "what it was trained on; go on in spite of this with --allow-drift; or train anew into "
            "a new folder with --fresh."
        )
    return changes


def _set_aside(folder: Path, disk: Disk) -> str:
    """Give a damaged checkpoint a name under which nothing takes it for one."""
    number, aside = 1, folder.with_name(f"{folder.name}.damaged")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged-{number}")
    disk.rename(folder, aside)
    return aside.name


def has_checkpoint(run: RunDirectory) -> bool:
    return bool(find_checkpoints(run.folder))
