"""What a model is worth on held-out rows, beside its base where it has an adapter."""

from __future__ import annotations

from typing import Any

from qlora_kit.data.prepare import Part
from qlora_kit.evaluate.evaluate import evaluate_model, evaluate_side_by_side
from qlora_kit.recipe import DataSpec, EvaluateSpec
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.runtime.protocol import Runtime
from qlora_kit.runtime.transformers import TransformersRuntime


def evaluate_held_out(
    runtime: Runtime,
    held_out: Part,
    spec: EvaluateSpec,
    data: DataSpec,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Figures on the held-out rows, of base and tuned model where there is an adapter.

    Of a model without one its own. Empty where no eval source is named.
    """
    if not held_out.sequences:
        return {}
    if isinstance(runtime, TransformersRuntime) and runtime.has_adapter:
        both = evaluate_side_by_side(runtime, held_out, spec, data, reporter)
        return both.as_dict()
    measured = evaluate_model(runtime, held_out, spec, data, reporter)
    return {"model": measured.as_dict()}
