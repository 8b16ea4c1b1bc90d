"""The straight line from a recipe to a certified model. Read this first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.checkpoint.run_directory import (
    RunDirectory,
    create_run,
    require_disk,
    require_free,
    write_json,
)
from qlora_kit.data.prepare import Part, prepare_eval, prepare_train
from qlora_kit.data.stream import StreamedSequences
from qlora_kit.environment import (
    probe_hardware,
    require_one_process,
    resolve_compute_dtype,
)
from qlora_kit.evaluate.divergence import DEFAULT_MAX_TOKENS
from qlora_kit.evaluate.evaluate import evaluate_model, evaluate_side_by_side, window_size
from qlora_kit.export.merge_run import merge_after_training
from qlora_kit.model.adapter import Adapted, attach_adapter
from qlora_kit.model.base import Base, load_base, prepare_for_training
from qlora_kit.model.saved import save_adapter
from qlora_kit.recipe import Recipe, recipe_hash
from qlora_kit.report import narrate
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.train.arguments import require_tf32, resolve_precision
from qlora_kit.train.batching import plan_batches
from qlora_kit.train.memory import MemoryWatch
from qlora_kit.train.train import TrainResult, train_adapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel
    from transformers import PreTrainedModel

    from qlora_kit.data.sequences import TokenSequence


@dataclass(frozen=True)
class RunResult:
    """What a run made, and what it is worth."""

    run: RunDirectory
    trained: TrainResult
    evaluation: dict[str, Any]
    certificate: dict[str, Any] | None

    @property
    def holds(self) -> bool:
        """Whether every budget of the recipe was met."""
        return self.certificate is None or bool(self.certificate["passed"])


def run_recipe(recipe: Recipe, reporter: Reporter = SILENT) -> RunResult:
    """Train, evaluate, merge and certify what a recipe describes.

    Raises:
        QloraKitError: whatever is at fault, before the work that it would spoil.
    """
    require_one_process()
    require_free(recipe)
    hardware = probe_hardware()
    compute_dtype, why = resolve_compute_dtype(recipe.quantization.compute_dtype, hardware)
    precision = resolve_precision(recipe.train.precision, compute_dtype, hardware)
    require_tf32(recipe.train.tf32, hardware)
    narrate.hardware(reporter, hardware, compute_dtype, why, precision)

    with MemoryWatch(hardware.device) as memory:
        memory.phase("loading")
        base = load_base(
            recipe.model,
            recipe.quantization,
            getattr(torch, compute_dtype),
            why,
            hardware,
            lora=recipe.lora,
        )
        if recipe.evaluate.perplexity and recipe.data.has_eval_rows:
            window_size(base.model, recipe.evaluate, recipe.data)  # rather now than after training
        prepare_for_training(base.model)
        narrate.base(reporter, base, recipe.quantization)

        train = prepare_train(recipe.data, base.tokenizer, base.stop_ids)
        held_out = prepare_eval(recipe.data, base.tokenizer, base.stop_ids)
        narrate.data(reporter, train, held_out, base.tokenizer)

        adapted = attach_adapter(base, recipe.lora, recipe.train.seed)
        batches = plan_batches(adapted.model, base, train, held_out.sequences, recipe.data)
        narrate.adapter(reporter, adapted, recipe)
        narrate.schedule(reporter, recipe.train, batches)

        require_disk(
            Path(recipe.run_dir), bytes_to_write(recipe, adapted, held_out.sequences), "this run"
        )
        run = create_run(recipe)
        write_ledger(run, train, held_out)

        def save(folder: Path) -> None:
            save_adapter(adapted.model, base, recipe.quantization, recipe_hash(recipe), folder)

        trained = train_adapter(
            adapted.model,
            base,
            batches,
            recipe.train,
            precision,
            hardware,
            run,
            memory,
            reporter,
            save,
        )
        save(run.adapter)
        train.ledger.padding_tokens = trained.num_padding_tokens
        if isinstance(batches.train, StreamedSequences):
            batches.train.settle()
        write_ledger(run, train, held_out)

        memory.phase("evaluating")
        evaluation = evaluate_held_out(adapted.model, base, held_out, recipe, reporter)
        write_json(run.evaluation, evaluation)

        memory.phase("merging")
        certificate = merge_after_training(
            adapted.model, base, held_out, recipe, run, hardware, reporter
        )

    result = RunResult(run, trained, evaluation, certificate)
    write_json(run.summary, summary_of(result, memory))
    narrate.summary(reporter, result.run, recipe)
    return result


def write_ledger(run: RunDirectory, train: Part, held_out: Part) -> None:
    write_json(run.ledger, {"train": train.ledger.as_dict(), "eval": held_out.ledger.as_dict()})


def evaluate_held_out(
    model: PeftModel | PreTrainedModel,
    base: Base,
    held_out: Part,
    recipe: Recipe,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Figures on the held-out rows, of base and tuned model where there is an adapter.

    Of a model without one its own. Empty where no eval source is named.
    """
    if not held_out.sequences:
        return {}
    if model is base.model:
        measured = evaluate_model(
            base.source.name, model, base, held_out, recipe.evaluate, recipe.data, reporter
        )
        return {"model": measured.as_dict()}
    return evaluate_side_by_side(
        model, base, held_out, recipe.evaluate, recipe.data, reporter
    ).as_dict()


def bytes_to_write(recipe: Recipe, adapted: Adapted, held_out: Sequence[TokenSequence] = ()) -> int:
    """At most what the run will leave on the disk: checkpoints, adapter, merged models.

    A checkpoint holds the adapter and its optimizer's two states, each in float32 at most
    (twenty checkpoints where all are kept); a merge whose base is chosen by measurement is there
    twice for a while, beside what the trained graph said on the held-out rows.
    """
    adapter = 4 * adapted.num_trainable
    kept = 0 if recipe.train.save_strategy == "no" else (recipe.train.save_total_limit or 20) + 1
    merges = {True: 2 if recipe.export.merge_options.base == "auto" else 1, False: 0}
    merged = 4 * adapted.num_parameters * merges[recipe.export.merge]
    vocabulary = adapted.model.config.get_text_config().vocab_size
    measured = sum(one.num_supervised for one in held_out[: recipe.export.merge_options.max_rows])
    record = 4 * vocabulary * min(measured, DEFAULT_MAX_TOKENS) if recipe.export.merge else 0
    return adapter * (1 + 3 * kept) + merged + record


def summary_of(result: RunResult, memory: MemoryWatch) -> dict[str, Any]:
    """`summary.json`, whose presence says that the run is finished."""
    return {
        "training": result.trained.as_dict(),
        "memory": memory.as_dict(),
        "evaluation": result.evaluation,
        "certificate": result.certificate,
        "holds": result.holds,
    }
