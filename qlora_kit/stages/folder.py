"""The folder of a run: room on the disk for all that it will hold, and what stands there first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.atomic import require_disk
from qlora_kit.checkpoint.entry import Entry
from qlora_kit.checkpoint.room import checkpoint_bytes, merged_bytes
from qlora_kit.checkpoint.run_directory import RunDirectory, create_run, fresh_folder, write_json
from qlora_kit.data.prepare import Part
from qlora_kit.environment import probe_hardware
from qlora_kit.evaluate.divergence import DEFAULT_MAX_TOKENS
from qlora_kit.export.shards import SURROUNDINGS_BYTES
from qlora_kit.model.adapter import Adapted
from qlora_kit.processes import join
from qlora_kit.recipe import Recipe, save_recipe
from qlora_kit.stages.prepare import Prepared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_kit.data.sequences import TokenSequence


def in_fresh_folder(recipe: Recipe) -> Recipe:
    """The recipe with a run_dir beside its own that is free, the same for every process."""
    processes = join(probe_hardware().device)
    return recipe.model_copy(update={"run_dir": processes.on_main(lambda: fresh_folder(recipe))})


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


def open_folder(recipe: Recipe, entry: Entry, ready: Prepared) -> RunDirectory:
    """Begin the folder of a new run, once there is room for all that it will hold; in that of an
    old one, note what the recipe has become. Where rows and tokens went is written into both.

    Raises:
        HardwareError: the disk has not that much room.
    """
    needed = bytes_to_write(recipe, ready.adapted, ready.held_out.sequences, entry.run)
    require_disk(Path(recipe.run_dir), needed, "this run")
    run = create_run(recipe) if entry.is_new else entry.run
    if entry.is_changed and not entry.is_new:
        save_recipe(recipe, run.recipe)
    write_ledger(run, ready.train, ready.held_out)
    return run


def write_ledger(run: RunDirectory, train: Part, held_out: Part) -> None:
    """Where every row and token of both parts went."""
    write_json(run.ledger, {"train": train.ledger.as_dict(), "eval": held_out.ledger.as_dict()})
