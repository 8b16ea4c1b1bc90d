"""What to change where a plan does not fit, each with the bytes that it saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_kit.plan.plan import Plan, Planner
from qlora_kit.train.arguments import optimizer_for

if TYPE_CHECKING:
    from qlora_kit.data.prepare import Part
    from qlora_kit.recipe import Recipe

Changes = Mapping[str, Any]
"""Overrides of a recipe, by key."""


@dataclass(frozen=True)
class Suggestion:
    """One change, or several at once."""

    overrides: tuple[str, ...]
    """As the command line takes them."""
    why: str
    saved_bytes: int
    """Of loading, training or evaluation, whichever it saves most of."""
    peak_bytes: int
    """Of the plan with it."""
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


def suggestions(
    recipe: Recipe, plan: Plan, planner: Planner, train: Part | None = None
) -> list[Suggestion]:
    """Each change that saves anything by itself, the largest saving first; then, where none is
    enough, all of those that leave the rows whole together: the smallest that this recipe gets.

    Args:
        train: the rows that the plan is of.
    """
    recipe = recipe.with_optimizer(optimizer_for(planner.hardware.device).name)
    found = []
    kept: dict[str, Any] = {}
    for changes, why, leaves_rows_whole in _candidates(recipe, plan):
        one = _tried(recipe, plan, changes, why, planner, train)
        if one.saved_bytes > 0:
            found.append(one)
            if leaves_rows_whole:
                kept |= changes
    found.sort(key=lambda one: -one.saved_bytes)
    if len(kept) > 1 and not any(one.fits for one in found):
        why = "all that leave the rows as they are"
        found.append(_tried(recipe, plan, kept, why, planner, train))
    return found


def _candidates(recipe: Recipe, plan: Plan) -> Iterator[tuple[Changes, str, bool]]:
    """(what to change, what that means, whether rows stay as long as they are)"""
    train, data = recipe.train, recipe.data
    if plan.choice.way.num_recomputing < plan.num_layers:
        yield {"train.gradient_checkpointing": True}, "all layers recompute; slower", True
    size = train.per_device_train_batch_size
    if size > 1:
        yield (
            {
                "train.per_device_train_batch_size": 1,
                "train.gradient_accumulation_steps": train.gradient_accumulation_steps * size,
            },
            "the same global batch, a sequence at a time",
            True,
        )
    generate = recipe.evaluate.generate
    if generate is not None and generate.batch_size > 1:
        why = "one answer at a time; slower"
        yield {"evaluate.generate.batch_size": 1}, why, True
    if not train.fused_loss:
        yield {"train.fused_loss": True}, "logits a chunk at a time", True
    if "8bit" not in train.optim:
        yield {"train.optim": "paged_adamw_8bit"}, "an optimizer with 8 bits of state", True
    if not recipe.quantization.is_quantized and recipe.quantization_aware is None:
        yield {"quantization.load_in_4bit": True}, "a base in 4 bits", True
    elif 4 in recipe.quantization.all_bits and not recipe.quantization.double_quant:
        yield {"quantization.double_quant": True}, "scales in 8 bits", True
    if recipe.lora.r > 8:
        yield {"lora.r": recipe.lora.r // 2}, "half the rank", False
    if data.max_length > 256:
        yield {"data.max_length": data.max_length // 2}, "half as long; see data.overlength", False


def _tried(
    recipe: Recipe, plan: Plan, changes: Changes, why: str, planner: Planner, train: Part | None
) -> Suggestion:
    changed = _changed(recipe, changes)
    if train is not None and changed.data.max_length < recipe.data.max_length:
        train = _cut(train, changed.data.max_length)
    after = planner.plan(changed, train)
    peak = after.peak.num_bytes
    saved = [one.num_bytes - after.moment(one.name).num_bytes for one in plan.moments]
    return Suggestion(
        tuple(f"{key}={_text(value)}" for key, value in changes.items()),
        why,
        max(saved),
        peak,
        peak <= plan.budget_bytes,
    )


def _cut(train: Part, length: int) -> Part:
    """The rows with no more tokens than that."""
    cut = [
        replace(one, input_ids=one.input_ids[:length], labels=one.labels[:length])
        for one in train.sequences
    ]
    return replace(train, sequences=cut)


def _changed(recipe: Recipe, changes: Changes) -> Recipe:
    values = recipe.model_dump()
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[name] = value
    return type(recipe).model_validate(values)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
