"""What follows training: the adapter, what it is worth, the merge, the exports, and the summary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_kit.checkpoint.checkpoints import clear_leftovers
from qlora_kit.checkpoint.run_directory import RunDirectory, write_json
from qlora_kit.data.stream import StreamedSequences
from qlora_kit.errors import CheckpointError
from qlora_kit.evaluate.held_out import evaluate_held_out
from qlora_kit.export.export_run import export_after_training
from qlora_kit.export.merge_run import merge_after_training
from qlora_kit.model.base import load_base, prepare_for_training, upcasts_norms
from qlora_kit.model.saved import load_adapter, save_adapter
from qlora_kit.plan.beside import Beside, note, training_beside
from qlora_kit.recipe import Recipe
from qlora_kit.report import narrate
from qlora_kit.runtime.transformers import TransformersRuntime
from qlora_kit.stages.folder import write_ledger
from qlora_kit.stages.prepare import Prepared
from qlora_kit.train.surroundings import Surroundings
from qlora_kit.train.train import TrainResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


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


def made_whole(
    recipe: Recipe,
    ready: Prepared,
    around: Surroundings,
    weights: dict[str, torch.Tensor] | None,
) -> Prepared:
    """What was trained sharded, all of it in this process: the adapter is saved with its gathered
    weights, and read again. What was not (None) is whole already.
    """
    if weights is None:
        return ready
    adapter = around.run.adapter
    around.keep_adapter(adapter, weights)
    base = load_base(
        recipe.model,
        recipe.quantization,
        ready.base.compute_dtype,
        ready.base.compute_reason,
        around.hardware,
        adapter=adapter,
        is_shared=True,
    )
    prepare_for_training(base.model, upcasts_norms(recipe.quantization, base.compute_dtype))
    model, _ = load_adapter(base, recipe.quantization, adapter)
    return replace(ready, base=base, adapted=replace(ready.adapted, model=model))


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
    evaluation = evaluate_held_out(tuned, held_out, recipe.evaluate, recipe.data, reporter)
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
