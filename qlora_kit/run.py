"""The straight line from a recipe to a certified model. Read this first."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.atomic import require_disk
from qlora_kit.checkpoint.checkpoints import clear_leftovers
from qlora_kit.checkpoint.disk import DISK, Disk
from qlora_kit.checkpoint.entry import (
    Entry,
    as_it_was,
    enter,
    require_alike,
    require_same_work,
    require_visible,
)
from qlora_kit.checkpoint.fingerprints import (
    FINGERPRINTS_FILE,
    Fingerprints,
    SourcePrint,
    fingerprints_text,
)
from qlora_kit.checkpoint.room import checkpoint_bytes, merged_bytes
from qlora_kit.checkpoint.run_directory import (
    RECIPE_RECORD,
    RunDirectory,
    create_run,
    fresh_folder,
    left_behind,
    write_json,
)
from qlora_kit.data.prepare import Part, fingerprint_of, prepare_eval, prepare_train
from qlora_kit.data.stream import StreamedSequences
from qlora_kit.endings import saying_what_is_kept, told_how_it_ends
from qlora_kit.environment import (
    Hardware,
    kit_version,
    launcher_settings,
    package_versions,
    probe_hardware,
    resolve_compute_dtype,
)
from qlora_kit.errors import CheckpointError, RunStopped
from qlora_kit.evaluate.divergence import DEFAULT_MAX_TOKENS
from qlora_kit.evaluate.evaluate import evaluate_model, evaluate_side_by_side, window_size
from qlora_kit.export.export_run import export_after_training
from qlora_kit.export.merge_run import merge_after_training
from qlora_kit.export.shards import SURROUNDINGS_BYTES
from qlora_kit.launcher import require_going_on, require_launch
from qlora_kit.model.adapter import Adapted, attach_adapter
from qlora_kit.model.base import Base, load_base, prepare_for_training
from qlora_kit.model.qat.aware import aware_of
from qlora_kit.model.qat.room import require_memory, room_for_each
from qlora_kit.model.saved import adapter_files, load_adapter, save_adapter
from qlora_kit.model.shared import require_same_base, state_checksum
from qlora_kit.model.tokenizer import template_hash, tokenizer_hash
from qlora_kit.plan.beside import Beside, note, training_beside
from qlora_kit.processes import Processes, common_hardware, join, leave
from qlora_kit.recipe import Recipe, recipe_hash, recipe_text, save_recipe
from qlora_kit.report import narrate
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.runtime.forward import context_tokens
from qlora_kit.runtime.protocol import Runtime
from qlora_kit.runtime.transformers import TransformersRuntime
from qlora_kit.startup import UNTIMED, Laps
from qlora_kit.train.arguments import require_tf32, resolve_precision
from qlora_kit.train.batching import Batching, plan_batches
from qlora_kit.train.continuation import Continuation, shape_for
from qlora_kit.train.memory import MemoryWatch, cgroup_limit_bytes
from qlora_kit.train.requests import TRIGGER_FILE, listening
from qlora_kit.train.sharded import gathered_trainables
from qlora_kit.train.surroundings import Surroundings
from qlora_kit.train.train import TrainResult, train_adapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

    from qlora_kit.data.sequences import TokenSequence
    from qlora_kit.recipe import QuantizationSpec


@dataclass(frozen=True)
class RunResult:
    """What a run made, and what it is worth."""

    run: RunDirectory
    trained: TrainResult
    evaluation: dict[str, Any]
    certificate: dict[str, Any] | None
    exports: Sequence[dict[str, Any]] = ()

    @property
    def holds(self) -> bool:
        """Whether every budget of the recipe was met."""
        made = [*self.exports, *([] if self.certificate is None else [self.certificate])]
        return all(one["passed"] for one in made)


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs, before anything is written."""

    base: Base
    train: Part
    held_out: Part
    adapted: Adapted
    batches: Batching
    precision: str

    def described(self, recipe: Recipe) -> tuple[PeftModel, Base, QuantizationSpec, str]:
        """What an adapter's files are written from."""
        return self.adapted.model, self.base, recipe.quantization, recipe_hash(recipe)


def run_recipe(
    recipe: Recipe,
    reporter: Reporter = SILENT,
    *,
    allow_drift: bool = False,
    disk: Disk = DISK,
    laps: Laps = UNTIMED,
) -> RunResult | None:
    """Train, evaluate, merge and certify what a recipe describes; an unfinished run is gone on
    with from its newest checkpoint.

    Under a launcher every process calls this; all but the main one return None.

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
        listening(Path(recipe.run_dir) / TRIGGER_FILE) as requests,
        told_how_it_ends(recipe, requests),
        MemoryWatch(hardware.device) as memory,
    ):
        entry = processes.on_main(lambda: enter(recipe, allow_drift, held, disk, processes.count))
        processes.together(lambda: require_visible(entry))
        processes.together(lambda: require_going_on(launcher_settings(), entry.checkpoint))
        narrate.entry(reporter, entry)
        hardware = as_it_was(hardware, entry.checkpoint)
        laps.lap("machine and run folder")
        memory.phase("loading")
        ready = prepare(recipe, hardware, processes, reporter, laps)
        prints = fingerprints(recipe, ready, hardware)
        require_alike(processes.gathered(prints))
        sources = sources_read(recipe, ready)
        continuation = continuation_of(entry, prints, sources, allow_drift, processes, reporter)
        shape = processes.together(lambda: shape_for(recipe.train, processes, continuation))
        narrate.schedule(reporter, recipe.train, ready.batches, shape)
        needed = bytes_to_write(recipe, ready.adapted, ready.held_out.sequences, entry.run)
        run = processes.on_main(lambda: open_folder(recipe, entry, needed))
        processes.on_main(lambda: write_ledger(run, ready.train, ready.held_out))
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
            if weights is not None:
                around.keep_adapter(run.adapter, weights)
                ready = made_whole(recipe, ready, run, hardware)
            return finish(recipe, ready, around, trained)


def continuation_of(
    entry: Entry,
    prints: Fingerprints,
    sources: Sequence[SourcePrint],
    allow_drift: bool,
    processes: Processes,
    reporter: Reporter,
) -> Continuation | None:
    """The checkpoint that training goes on from, once nothing has changed that it rests on."""
    checkpoint = entry.checkpoint
    if checkpoint is None:
        return None
    drift = processes.together(
        lambda: require_same_work(checkpoint, prints, allow_drift, sources, entry.undecided)
    )
    narrate.drift(reporter, drift)
    return processes.together(lambda: Continuation.read(checkpoint, allow_drift))


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


def in_fresh_folder(recipe: Recipe) -> Recipe:
    """The recipe with a run_dir beside its own that is free, the same for every process."""
    processes = join(probe_hardware().device)
    return recipe.model_copy(update={"run_dir": processes.on_main(lambda: fresh_folder(recipe))})


def made_whole(recipe: Recipe, ready: Prepared, run: RunDirectory, hardware: Hardware) -> Prepared:
    """Of a model that was trained sharded, all of it in this process, with the adapter saved."""
    computed = (ready.base.compute_dtype, ready.base.compute_reason)
    base = load_base(
        recipe.model, recipe.quantization, *computed, hardware, adapter=run.adapter, is_shared=True
    )
    model, _ = load_adapter(base, recipe.quantization, run.adapter)
    return replace(ready, base=base, adapted=replace(ready.adapted, model=model))


def prepare(
    recipe: Recipe,
    hardware: Hardware,
    processes: Processes,
    reporter: Reporter,
    laps: Laps = UNTIMED,
) -> Prepared:
    """Load the base, render the data, attach a fresh adapter."""
    compute_dtype, why = resolve_compute_dtype(recipe.quantization.compute_dtype, hardware)
    precision = resolve_precision(recipe.train.precision, compute_dtype, hardware)
    require_tf32(recipe.train.tf32, hardware)
    processes.together(
        lambda: require_launch(
            launcher_settings(), recipe, precision, hardware.device, processes.count
        )
    )
    narrate.hardware(reporter, hardware, compute_dtype, why, precision)

    dtype: torch.dtype = getattr(torch, compute_dtype)
    aware = aware_of(recipe.quantization_aware, recipe.export.merge_options.dtype, dtype)
    room = room_for_each(
        hardware,
        recipe.train.max_memory_mib,
        container_bytes=cgroup_limit_bytes(),
        num_processes_here=processes.count_here,
    )
    is_shared = processes.count > 1 and recipe.quantization.is_quantized
    base = (processes.first_here if is_shared else processes.together)(
        lambda: load_base(
            recipe.model,
            recipe.quantization,
            dtype,
            why,
            hardware,
            lora=recipe.lora,
            aware=recipe.quantization_aware,
            is_shared=is_shared,
            before_reading=lambda skeleton: require_memory(
                skeleton, aware, recipe.train.optim, dtype, room
            ),
            reporter=reporter,
            laps=laps,
        )
    )
    if processes.count > 1:
        require_same_base(processes.gathered(state_checksum(base.model)))
    if recipe.evaluate.perplexity and recipe.data.has_eval_rows:
        # Rather now than after training.
        processes.together(
            lambda: window_size(context_tokens(base.model), recipe.evaluate, recipe.data)
        )
    prepare_for_training(base.model)
    narrate.base(reporter, base, recipe.quantization)
    laps.lap("check of the base")

    train, held_out = processes.first_here(
        lambda: (
            prepare_train(recipe.data, base.tokenizer, base.stop_ids),
            prepare_eval(recipe.data, base.tokenizer, base.stop_ids),
        )
    )
    narrate.data(reporter, train, held_out, base.tokenizer)
    laps.lap("data")

    adapted = processes.together(
        lambda: attach_adapter(base, recipe.lora, recipe.train.seed, aware)
    )
    batches = processes.together(
        lambda: plan_batches(adapted.model, base, train, held_out.sequences, recipe.data)
    )
    narrate.adapter(reporter, adapted, recipe)
    laps.lap("adapter")
    return Prepared(base, train, held_out, adapted, batches, precision)


def fingerprints(recipe: Recipe, ready: Prepared, hardware: Hardware) -> Fingerprints:
    """What the numbers of training depend on, besides the recipe."""
    versions = package_versions()
    return Fingerprints(
        base=ready.base.fingerprint,
        tokenizer=tokenizer_hash(ready.base.tokenizer),
        chat_template=template_hash(ready.base.tokenizer) or "",
        data_train=fingerprint_of(ready.train),
        data_eval=fingerprint_of(ready.held_out),
        packages=", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        hardware=hardware.device_name,
        compute=str(ready.base.compute_dtype).removeprefix("torch."),
        native_bf16="yes" if hardware.native_bf16 else "no",
        qlora_kit=kit_version(),
    )


def sources_read(recipe: Recipe, ready: Prepared) -> tuple[SourcePrint, ...]:
    """The sources of both parts of the data, each with its digest and number of rows."""
    named = {"train": recipe.data.train, "eval": recipe.data.eval or recipe.data.train}
    return tuple(
        SourcePrint(part, source.name, digest, read.ledger.rows_of.get(source.name))
        for part, read in (("train", ready.train), ("eval", ready.held_out))
        for source, digest in zip(named[part], read.digests, strict=False)
    )


def open_folder(recipe: Recipe, entry: Entry, needed_bytes: int) -> RunDirectory:
    """Begin the folder of a new run, once there is room for all that it will hold; in that of an
    old one, note what the recipe has become.
    """
    require_disk(Path(recipe.run_dir), needed_bytes, "this run")
    if entry.is_new:
        return create_run(recipe)
    if entry.is_changed:
        save_recipe(recipe, entry.run.recipe)
    return entry.run


def finish(
    recipe: Recipe, ready: Prepared, around: Surroundings, trained: TrainResult
) -> RunResult:
    """What follows training: the adapter, what it is worth, and the merge."""
    model, base, held_out = ready.adapted.model, ready.base, ready.held_out
    run, memory, reporter = around.run, around.memory, around.reporter
    save_adapter(*ready.described(recipe), run.adapter)
    ready.train.ledger.padding_tokens = trained.num_padding_tokens
    if isinstance(ready.batches.train, StreamedSequences):
        ready.batches.train.settle()
    write_ledger(run, ready.train, held_out)

    memory.phase("evaluating")
    tuned = TransformersRuntime.on_base("tuned", model, base)
    evaluation = evaluate_held_out(tuned, held_out, recipe, reporter)
    write_json(run.evaluation, evaluation)

    memory.phase("merging")
    certificate = merge_after_training(
        model, base, held_out, recipe, run, around.hardware, reporter
    )
    memory.phase("exporting")
    exports = export_after_training(model, base, held_out, recipe, run, around.hardware, reporter)
    result = RunResult(run, trained, evaluation, certificate, exports)
    leave_tidy(run, around)
    seen = memory.as_dict()  # before the prediction, which takes some itself
    foretold = training_beside(recipe, ready.batches, trained, around.hardware, memory)
    if foretold is not None:
        note(foretold, run.log, trained.num_steps)
    write_json(run.summary, summary_of(result, seen, foretold))
    narrate.summary(reporter, run, recipe)
    return result


def leave_tidy(run: RunDirectory, around: Surroundings) -> None:
    """Remove what a removal has left that the disk did not carry out, and never told."""
    try:
        clear_leftovers(run.folder, around.disk)
    except CheckpointError as refused:
        around.reporter.warn(str(refused))


def write_ledger(run: RunDirectory, train: Part, held_out: Part) -> None:
    write_json(run.ledger, {"train": train.ledger.as_dict(), "eval": held_out.ledger.as_dict()})


def evaluate_held_out(
    runtime: Runtime,
    held_out: Part,
    recipe: Recipe,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Figures on the held-out rows, of base and tuned model where there is an adapter.

    Of a model without one its own. Empty where no eval source is named.
    """
    if not held_out.sequences:
        return {}
    if isinstance(runtime, TransformersRuntime) and runtime.has_adapter:
        both = evaluate_side_by_side(runtime, held_out, recipe.evaluate, recipe.data, reporter)
        return both.as_dict()
    measured = evaluate_model(runtime, held_out, recipe.evaluate, recipe.data, reporter)
    return {"model": measured.as_dict()}


def bytes_to_write(
    recipe: Recipe,
    adapted: Adapted,
    held_out: Sequence[TokenSequence] = (),
    run: RunDirectory | None = None,
) -> int:
    """At most what the run will leave on the disk beside what it holds already: checkpoints,
    adapter, merged models.

    A checkpoint holds the adapter and its optimizer's two states, each in float32 at most
    (twenty checkpoints where all are kept). The adapter is written beside the one that is there.
    """
    adapter = 4 * adapted.num_trainable
    kept = 0 if recipe.train.save_strategy == "no" else (recipe.train.save_total_limit or 20) + 1
    saved, merged = 3 * adapter * kept, _bytes_to_merge(recipe, adapted, held_out)
    if run is not None:
        saved = max(0, saved - checkpoint_bytes(run))
        merged = max(0, merged - merged_bytes(run))
    return adapter + saved + merged


def _bytes_to_merge(
    recipe: Recipe, adapted: Adapted, held_out: Sequence[TokenSequence] = ()
) -> int:
    """Of a merge whose base is chosen by measurement there are two for a while, beside what the
    trained graph said on the held-out rows and what stands beside weights.
    """
    if not recipe.export.merge:
        return 0
    options = recipe.export.merge_options
    is_twice = options.base == "auto" or recipe.quantization_aware is not None
    vocabulary: int = adapted.model.config.get_text_config().vocab_size
    measured = sum(one.num_supervised for one in held_out[: options.max_rows])
    record = 4 * vocabulary * min(measured, DEFAULT_MAX_TOKENS)
    return 4 * adapted.num_parameters * (2 if is_twice else 1) + record + SURROUNDINGS_BYTES


def summary_of(
    result: RunResult, memory: dict[str, object], foretold: Beside | None = None
) -> dict[str, Any]:
    """`summary.json`, whose presence says that the run is finished."""
    return {
        "training": result.trained.as_dict(),
        "memory": {
            **memory,
            "training": None if foretold is None else foretold.as_dict(),
        },
        "evaluation": result.evaluation,
        "certificate": result.certificate,
        "exports": list(result.exports),
        "holds": result.holds,
    }
