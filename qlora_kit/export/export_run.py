"""What a recipe's `export.to` asks for, made right after training, from the model in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_kit.export.export import export_reopened
from qlora_kit.export.jobs import ExportRequest, make_way
from qlora_kit.export.places import places_of
from qlora_kit.export.reopen import Reopened
from qlora_kit.export.targets import parse_target
from qlora_kit.export.trained import trained_adapter
from qlora_kit.recipe import recipe_hash
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.checkpoint.run_directory import RunDirectory
    from qlora_kit.data.prepare import Part
    from qlora_kit.environment import Hardware
    from qlora_kit.model.base import Base
    from qlora_kit.recipe import Recipe


def export_after_training(
    model: PeftModel,
    base: Base,
    held_out: Part,
    recipe: Recipe,
    run: RunDirectory,
    hardware: Hardware,
    reporter: Reporter = SILENT,
) -> list[dict[str, Any]]:
    """The certificates of all exports that the recipe names; the adapter must be saved.

    What an attempt that was killed before its summary was written has exported is made again.

    Raises:
        QloraKitError: what `export_reopened` raises; the one at fault leaves nothing.
    """
    if not recipe.export.to:
        return []
    places = places_of(run.folder)
    request = ExportRequest(
        targets=tuple(parse_target(name) for name in recipe.export.to),
        merge=recipe.export.merge_options,
    )
    make_way(request, places)
    trained = trained_adapter(run.adapter, base, recipe.quantization, recipe.model)
    reopened = Reopened(trained, held_out.sequences, recipe_hash(recipe), model)
    return export_reopened(reopened, request, places, hardware, reporter)
