"""Entering a run directory: a new run, one to go on with, or one that must be left alone."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_kit.checkpoint.checkpoints import Found, clear_leftovers, newest_whole
from qlora_kit.checkpoint.disk import Disk
from qlora_kit.checkpoint.drift import Change, Drift, compare, lines_of, refusal
from qlora_kit.checkpoint.fingerprints import (
    Fingerprints,
    Sources,
    differences,
    read_fingerprints,
)
from qlora_kit.checkpoint.global_batch import batch_of
from qlora_kit.checkpoint.lock import hold
from qlora_kit.checkpoint.room import clear_dead_drafts
from qlora_kit.checkpoint.run_directory import (
    RECIPE_RECORD,
    RunDirectory,
    is_begun,
    require_free,
    without_recipe,
)
from qlora_kit.environment import Hardware
from qlora_kit.errors import RunError
from qlora_kit.recipe import Recipe, load_written_out, save_recipe


@dataclass(frozen=True)
class Entry:
    """What was found in the folder of a run."""

    run: RunDirectory
    recipe: Recipe
    """The one asked for, and the optimizer that it leaves to the kit."""
    is_new: bool
    checkpoint: Path | None = None
    """A whole checkpoint to go on from; None where training begins at the first update."""
    said: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()
    undecided: tuple[Change, ...] = ()
    """Other names for the data; `require_same_work` decides upon them."""
    is_changed: bool = False
    """Whether the recipe that the folder holds is not the one that is gone on with."""


def enter(
    recipe: Recipe,
    allow_drift: bool,
    held: ExitStack,
    disk: Disk,
    num_processes: int = 1,
    *,
    optimizer: str,
) -> Entry:
    """Look at the recipe's folder, which is locked until `held` is left.

    Nothing is written for a new run: `create_run` does so once it can begin. A recipe that is
    gone is written anew from a whole checkpoint.

    Args:
        optimizer: that `train.optim: auto` is in a new run.

    Raises:
        RunError: the folder holds something else, a finished run, a run of a recipe that differs
            where it may not, or another process is at work in it.
    """
    run = RunDirectory(Path(recipe.run_dir))
    if not is_begun(run):
        require_free(recipe)
    warned: list[str] = []
    held.enter_context(hold(run.folder, warned.append))
    if not is_begun(run) or run.is_finished:
        require_free(recipe)
        clear_leftovers(run.folder, disk)
        return Entry(run, recipe.with_optimizer(optimizer), is_new=True, warned=tuple(warned))
    clear_leftovers(run.folder, disk)
    clear_dead_drafts(run, disk)
    found = newest_whole(run.folder)
    if run.summary.exists():
        warned.append(_summary_set_aside(run, found, disk))
    held_by_folder = run.read_recipe()
    if held_by_folder is None:
        warned.append(_recipe_put_back(run, found, recipe, disk))
        held_by_folder = load_written_out(run.recipe)
    saved = _trained_by(found) or held_by_folder
    going_on = recipe.with_optimizer(saved.train.optim).with_optimizer(optimizer)
    _require_consistent(going_on, run)
    drift = _drift(saved, recipe, found, num_processes)
    holds_work = found.folder is not None or found.damaged or run.adapter.is_dir()
    is_possible = all(change.is_possible for change in drift.breaking)
    if drift.breaking and holds_work and not (allow_drift and is_possible):
        raise RunError(refusal(drift, str(run.folder)))
    warned += [
        f"{folder.name} is damaged ({'; '.join(faults[:3])}) and is set aside as "
        f"{_set_aside(folder, disk)}."
        for folder, faults in found.damaged
    ]
    warned += lines_of(Drift(breaking=drift.breaking))
    said = [f"{run.folder} holds a run that did not end.", *lines_of(Drift(drift.accepted))]
    if found.folder is not None:
        said.append(f"resume    {found.folder.name} is whole; training goes on from there")
    else:
        _tell_of_beginning(run, found, said, warned)
    if recipe.train.optim == "auto" and going_on.train.optim != optimizer:
        said.append(
            f"optimizer {going_on.train.optim} (auto: with which the run was begun; a new one "
            f"would have {optimizer})"
        )
    return Entry(
        run,
        going_on,
        False,
        found.folder,
        tuple(said),
        tuple(warned),
        drift.undecided,
        is_changed=held_by_folder != going_on,
    )


def _require_consistent(going_on: Recipe, run: RunDirectory) -> None:
    """Raises RunError where a run's optimizer does not go with the recipe that leaves it open."""
    for fault in going_on.train.contradictions():
        raise RunError(
            f"{run.folder} was begun with train.optim: {going_on.train.optim}, and train."
            f"{fault.path} {fault.message}. Take it out, name the optimizer that is meant, or "
            "train into a new folder with --fresh."
        )


def _tell_of_beginning(run: RunDirectory, found: Found, said: list[str], warned: list[str]) -> None:
    """There is no checkpoint; a warning where one was, or where updates are lost."""
    if found.damaged:
        warned.append(
            f"{run.folder} holds no whole checkpoint: training begins at the first update."
        )
    elif run.log.is_file() and run.log.stat().st_size:
        warned.append(
            f"{run.folder} holds a log of updates, but no checkpoint of them: training begins at "
            "the first update. Put its checkpoints back where you have them."
        )
    else:
        said.append("resume    it had written no checkpoint: training begins at the first update")


def _trained_by(found: Found) -> Recipe | None:
    """The recipe of the checkpoint itself: that of the folder may be newer, where a run that went
    on with other values was killed before it saved.
    """
    record = None if found.folder is None else found.folder / RECIPE_RECORD
    return None if record is None or not record.is_file() else load_written_out(record)


def _drift(saved: Recipe, now: Recipe, found: Found, num_processes: int) -> Drift:
    """Without a checkpoint there are no rows that those of now could be held against."""
    begun = None if found.folder is None else batch_of(found.folder)
    drift = compare(saved, now, begun, num_processes)
    return drift.decided() if found.folder is None else drift


def _summary_set_aside(run: RunDirectory, found: Found, disk: Disk) -> str:
    """Of a run that was finished, whose figures are lost.

    Raises:
        RunError: there is no checkpoint, so that all of it would be trained again.
    """
    if found.folder is None:
        raise RunError(
            f"{run.summary} is damaged, and there is no checkpoint to go on from. Delete it to "
            "train anew in this folder, or train into a new one with --fresh."
        )
    aside = _set_aside(run.summary, disk)
    return f"{run.summary} is damaged and is set aside as {aside}; what it tells is measured again."


def _recipe_put_back(run: RunDirectory, found: Found, asked: Recipe, disk: Disk) -> str:
    """Write the recipe of the newest whole checkpoint as that of the run; says so.

    Raises:
        RunError: there is none.
    """
    recipe = _trained_by(found)
    if recipe is None or found.folder is None:
        raise RunError(without_recipe(run, asked, found))
    how = "was gone; it"
    if run.recipe.exists():
        how = f"cannot be read and is set aside as {_set_aside(run.recipe, disk)}; it"
    save_recipe(recipe, run.recipe)
    return (
        f"{run.recipe} {how} is written again from {found.folder.name}, which holds the "
        "recipe that it was trained by."
    )


def require_visible(entry: Entry) -> None:
    """Raises RunError where the checkpoint that was found is not seen from this machine."""
    if entry.checkpoint is not None and not entry.checkpoint.is_dir():
        raise RunError(
            f"{socket.gethostname()} does not see {entry.checkpoint.absolute()}, which the main "
            "process goes on from; put run_dir on a disk that all machines share."
        )


def require_alike(prints: Sequence[Fingerprints]) -> None:
    """Of every process, in the order of ranks.

    Raises:
        RunError: they would train on different data or on different bases.
    """
    for rank, one in enumerate(prints):
        drift = differences(prints[0], one)
        if drift.breaking:
            listed = "\n".join(
                f"  - {change.difference} (process 0 → process {rank})" for change in drift.breaking
            )
            raise RunError(
                f"the processes do not train on the same things:\n{listed}\n"
                "Give every machine the same files."
            )


def require_same_work(
    checkpoint: Path,
    now: Fingerprints,
    allow_drift: bool,
    sources: Sources = (),
    undecided: tuple[Change, ...] = (),
) -> Drift:
    """What else than the recipe has changed since a checkpoint was written, and what was left
    `undecided` of the recipe.

    Raises:
        RunError: something has that makes it another run, and drift is not allowed.
    """
    saved, sources_saved = read_fingerprints(checkpoint)
    drift = differences(saved, now, sources_saved, sources)
    changed = {one.field for one in drift.breaking}
    same_parts = {part for part in ("train", "eval") if f"data_{part}" not in changed}
    drift = Drift(undecided=undecided).decided(same_parts) + drift
    if drift.breaking and not allow_drift:
        raise RunError(refusal(drift, str(checkpoint.parent)))
    return drift


def as_it_was(hardware: Hardware, checkpoint: Path | None) -> Hardware:
    """The machine as the run found it that goes on on it: a timed probe may come out otherwise
    beside other work, and `auto` would then stand for another dtype.
    """
    if checkpoint is None:
        return hardware
    saved, _ = read_fingerprints(checkpoint)
    then, now = saved.native_bf16, "yes" if hardware.native_bf16 else "no"
    if saved.hardware != hardware.device_name or then in ("", now):
        return hardware
    return replace(
        hardware,
        native_bf16=then == "yes",
        slow_bf16=then == "no",
        reason=f"as at the begin of the run (now {hardware.reason})",
    )


def _set_aside(path: Path, disk: Disk) -> str:
    """Give what is damaged a name under which nothing takes it for what it was."""
    number, aside = 1, path.with_name(f"{path.name}.damaged")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    disk.rename(path, aside)
    return aside.name
