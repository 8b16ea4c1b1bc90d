"""The straight line from a recipe to a certified model. Read this first."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from qlora_kit.checkpoint.disk import DISK, Disk
from qlora_kit.checkpoint.entry import as_it_was, enter, require_alike, require_visible
from qlora_kit.checkpoint.fingerprints import FINGERPRINTS_FILE, fingerprints_text
from qlora_kit.checkpoint.run_directory import RECIPE_RECORD, left_behind
from qlora_kit.endings import saying_what_is_kept, told_how_it_ends
from qlora_kit.environment import launcher_settings, probe_hardware
from qlora_kit.errors import RunStopped
from qlora_kit.launcher import require_going_on
from qlora_kit.model.saved import adapter_files, save_adapter
from qlora_kit.processes import common_hardware, join, leave
from qlora_kit.recipe import Recipe, recipe_text
from qlora_kit.report import narrate
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.stages.basis import continuation_of, fingerprints, sources_read
from qlora_kit.stages.finish import RunResult, finish, made_whole
from qlora_kit.stages.folder import open_folder
from qlora_kit.stages.prepare import Prepared, prepare
from qlora_kit.startup import UNTIMED, Laps
from qlora_kit.train.arguments import optimizer_for
from qlora_kit.train.continuation import Continuation, shape_for
from qlora_kit.train.memory import MemoryWatch
from qlora_kit.train.requests import TRIGGER_FILE, listening
from qlora_kit.train.sharded import gathered_trainables
from qlora_kit.train.surroundings import Surroundings
from qlora_kit.train.train import TrainResult, train_adapter


def run_recipe(
    recipe: Recipe,
    reporter: Reporter = SILENT,
    *,
    allow_drift: bool = False,
    disk: Disk = DISK,
    laps: Laps = UNTIMED,
    ends_process: bool = False,
) -> RunResult | None:
    """Train, evaluate, merge and certify what a recipe describes; an unfinished run is gone on
    with from its newest checkpoint.

    Under a launcher every process calls this; all but the main one return None.

    Args:
        ends_process: see `listening`.

    Raises:
        QloraKitError: whatever is at fault, before the work that it would spoil.
        RunStopped: a signal ended training; there is a checkpoint.
    """
    hardware = probe_hardware()
    processes = join(hardware.device)
    hardware = common_hardware(processes.gathered(hardware))
    reporter = reporter if processes.is_main else SILENT
    with (
        ExitStack() as held,
        listening(Path(recipe.run_dir) / TRIGGER_FILE, ends_process=ends_process) as requests,
        told_how_it_ends(recipe, requests),
        MemoryWatch(hardware.device) as memory,
    ):
        auto = optimizer_for(hardware.device, is_sharded=launcher_settings().fsdp)
        entry = processes.on_main(
            lambda: enter(recipe, allow_drift, held, disk, processes.count, optimizer=auto.name)
        )
        processes.together(lambda: require_visible(entry))
        processes.together(lambda: require_going_on(launcher_settings(), entry.checkpoint))
        narrate.entry(reporter, entry)
        is_auto = recipe.train.optim == "auto"
        recipe = recipe.with_optimizer(entry.recipe.train.optim)
        hardware = as_it_was(hardware, entry.checkpoint)
        laps.lap("machine and run folder")
        memory.phase("loading")
        ready = prepare(recipe, hardware, processes, reporter, laps)
        prints = fingerprints(recipe, ready, hardware)
        require_alike(processes.gathered(prints))
        sources = sources_read(recipe, ready)
        continuation = continuation_of(entry, prints, sources, allow_drift, processes, reporter)
        shape = processes.together(lambda: shape_for(recipe.train, processes, continuation))
        if is_auto and recipe.train.optim == auto.name:
            narrate.optimizer(reporter, auto)
        narrate.schedule(reporter, recipe.train, ready.batches, shape)
        run = processes.on_main(lambda: open_folder(recipe, entry, ready))
        laps.lap("fingerprints and run folder")
        around = Surroundings(
            hardware=hardware,
            precision=ready.precision,
            run=run,
            memory=memory,
            reporter=reporter,
            requests=requests,
            adapter_files=adapter_files(*ready.described(recipe)),
            keep_adapter=partial(save_adapter, *ready.described(recipe)),
            records={
                RECIPE_RECORD: recipe_text(recipe),
                FINGERPRINTS_FILE: fingerprints_text(prints, sources),
            },
            processes=processes,
            disk=disk,
            laps=laps,
        )
        laps.lap("what a checkpoint holds")
        trained, weights = train(recipe, ready, around, continuation)
        if not processes.is_main:
            return None
        with saying_what_is_kept(recipe):
            ready = made_whole(recipe, ready, around, weights)
            return finish(recipe, ready, around, trained)


def train(
    recipe: Recipe, ready: Prepared, around: Surroundings, continuation: Continuation | None
) -> tuple[TrainResult, dict[str, torch.Tensor] | None]:
    """Train with all processes, and part from the others; where the model was sharded, with the
    adapter's weights.
    """
    model = ready.adapted.model
    with saying_what_is_kept(recipe):
        trained = train_adapter(
            model, ready.base, ready.batches, recipe.train, around, continuation
        )
    weights = gathered_trainables(model)
    leave(around.processes)
    if trained.stop_signal is not None:
        raise RunStopped(trained.stop_signal, left_behind(recipe))
    return trained, weights
