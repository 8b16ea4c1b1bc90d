"""What differs between the recipe that a run was begun with and the one it is continued with.

A change is accepted where training goes on exactly as it would have, or where that is what the
user asks for (more epochs). All others break the promise that a continued run is the
uninterrupted one, and a field that nobody has classified is among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from qlora_kit.recipe import Recipe, TrainSpec
from qlora_kit.recipe.base import Spec

_MAX_CHARACTERS = 60

_AFTER_TRAINING = "nothing reads it before training has ended"
_CHECKPOINTS = "checkpoints are written or kept otherwise from here on"
_LOG = "what is logged from here on"
_EVALUATIONS = "the loss on held-out rows is taken at other steps; training does not see it"

# Field → what comes of changing it: training does not notice.
HARMLESS: dict[str, str] = {
    "run_dir": "the same run in a folder of another name",
    "data.max_dropped_share": "only when the run would stop, not which rows are trained on",
    "train.gradient_checkpointing": "the same numbers for other memory and time",
    "train.per_device_eval_batch_size": "the eval loss may differ by rounding",
    "train.logging_steps": _LOG,
    "train.report_to": _LOG,
    "train.save_strategy": _CHECKPOINTS,
    "train.save_steps": _CHECKPOINTS,
    "train.save_minutes": _CHECKPOINTS,
    "train.save_total_limit": _CHECKPOINTS,
    "train.keep_best": _CHECKPOINTS,
    "train.max_memory_mib": "other sequences at a time, so the numbers may differ by rounding",
    "evaluate.perplexity": _AFTER_TRAINING,
    "evaluate.window_tokens": _AFTER_TRAINING,
    "evaluate.stride_tokens": _AFTER_TRAINING,
    "evaluate.baseline": _AFTER_TRAINING,
    "evaluate.generate": _AFTER_TRAINING,
    "evaluate.generate.metrics": _AFTER_TRAINING,
    "evaluate.generate.max_new_tokens": _AFTER_TRAINING,
    "evaluate.generate.batch_size": _AFTER_TRAINING,
    "evaluate.generate.max_rows": _AFTER_TRAINING,
    "export.to": _AFTER_TRAINING,
    "export.merge": _AFTER_TRAINING,
    "export.merge_options.base": _AFTER_TRAINING,
    "export.merge_options.dtype": _AFTER_TRAINING,
    "export.merge_options.max_kl": _AFTER_TRAINING,
    "export.merge_options.max_rows": _AFTER_TRAINING,
    "export.merge_options.max_shard_bytes": _AFTER_TRAINING,
}

_UPDATES = "updates before and after are made by different rules; no uninterrupted run does both"
_RATE = "the learning rate from here on is not the one that the run was begun with"
_NUMBERS = "losses and gradients come out otherwise than before"

# Field, or section of which every field that is not above breaks → what comes of it.
BREAKING: dict[str, str] = {
    "model": "the adapter goes on on another base, tokenizer or template than it has learned on",
    "quantization": "the adapter goes on on other base weights or products than it has learned on",
    "quantization_aware": "the weights are quantized otherwise than those that it has learned with",
    "quantization_aware.train": "an adapter and whole weights do not go on from each other",
    "lora": "the adapter has another shape or scale than the one in the checkpoint",
    "data": "other rows, or the same in another order: some are seen twice and some never",
    "train.learning_rate": _RATE,
    "train.lr_scheduler_type": _RATE,
    "train.lr_scheduler_kwargs": _RATE,
    "train.warmup_steps": _RATE,
    "train.optim": "the state of the other optimizer cannot be read: its running means are lost",
    "train.weight_decay": _UPDATES,
    "train.adam_beta1": _UPDATES,
    "train.adam_beta2": _UPDATES,
    "train.adam_epsilon": _UPDATES,
    "train.loraplus_lr_ratio": _UPDATES,
    "train.max_grad_norm": _UPDATES,
    "train.neftune_noise_alpha": _UPDATES,
    "train.precision": _NUMBERS,
    "train.tf32": _NUMBERS,
    "train.seed": "the order of rows, dropout and noise are others: rows are seen twice or never",
    "train.train_sampling_strategy": "another order of rows: some are seen twice and some never",
}
_UNKNOWN = "not known to be harmless"

_BATCH = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
_LENGTH = ("train.num_train_epochs", "train.max_steps")
_EVALUATING = ("train.eval_strategy", "train.eval_steps")
# Fields whose verdict depends on both values, or on other fields.
WEIGHED = (*_BATCH, *_LENGTH, *_EVALUATING)


@dataclass(frozen=True)
class Change:
    """A field of the recipe that is not as it was, and what comes of that."""

    field: str
    before: Any
    now: Any
    consequence: str

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.before)} → {_short(self.now)} ({self.consequence})"


@dataclass(frozen=True)
class Drift:
    """Changes that training can go on with, and those that make it another run."""

    accepted: tuple[Change, ...] = ()
    breaking: tuple[Change, ...] = ()

    def __add__(self, other: Drift) -> Drift:
        return Drift(self.accepted + other.accepted, self.breaking + other.breaking)


def compare(saved: Recipe, now: Recipe) -> Drift:
    """Field by field, under the dotted names of the recipe."""
    accepted: list[Change] = []
    breaking: list[Change] = []
    for field, one, other in _differences(saved, now, ""):
        is_accepted, consequence = _verdict(field, saved.train, now.train, now.lora.dropout > 0)
        change = Change(field, one, other, consequence)
        (accepted if is_accepted else breaking).append(change)
    return Drift(tuple(accepted), tuple(breaking))


def _differences(saved: Any, now: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, Spec) and type(saved) is type(now):
        for name in type(saved).model_fields:
            below = f"{path}.{name}" if path else name
            yield from _differences(getattr(saved, name), getattr(now, name), below)
    elif _are_specs(saved) and _are_specs(now) and len(saved) == len(now):
        for number, (one, other) in enumerate(zip(saved, now, strict=True)):
            yield from _differences(one, other, f"{path}.{number}")
    elif saved != now:
        yield path, _plain(saved), _plain(now)


def _are_specs(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(one, Spec) for one in value)


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.model_dump(mode="json")
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _verdict(field: str, saved: TrainSpec, now: TrainSpec, is_dropout_on: bool) -> tuple[bool, str]:
    """Whether a change is accepted, and what comes of it."""
    name = re.sub(r"\.\d+(?=\.|$)", "", field)  # data.train.0.path is data.train.path
    if name in HARMLESS:
        return True, HARMLESS[name]
    if name in _BATCH:
        return _batch_verdict(saved, now, is_dropout_on)
    if name in _LENGTH:
        return _length_verdict(name, saved, now)
    if name in _EVALUATING:
        is_read = "reduce_lr_on_plateau" in (saved.lr_scheduler_type, now.lr_scheduler_type)
        return not is_read, _RATE if is_read else _EVALUATIONS
    return False, BREAKING.get(name) or BREAKING.get(name.partition(".")[0], _UNKNOWN)


def _batch_verdict(saved: TrainSpec, now: TrainSpec, is_dropout_on: bool) -> tuple[bool, str]:
    before, after = (
        one.per_device_train_batch_size * one.gradient_accumulation_steps for one in (saved, now)
    )
    if before != after:
        return False, (
            f"an update sees {after} sequences of a device instead of {before}, and the place in "
            "the data, which is counted in updates, is another"
        )
    draws = (
        " and other draws of dropout or noise" if is_dropout_on or now.neftune_noise_alpha else ""
    )
    return True, (
        f"an update still sees the same {after} sequences of a device, in the same order; the "
        f"numbers differ by rounding{draws}, so not to the bit"
    )


def _length_verdict(name: str, saved: TrainSpec, now: TrainSpec) -> tuple[bool, str]:
    if name == "train.num_train_epochs" and saved.max_steps and now.max_steps:
        return True, "no effect: train.max_steps decides"
    if (saved.max_steps is None) != (now.max_steps is None):
        return False, "the length is counted otherwise, so nobody knows whether it is the same"
    before, after = (
        one.max_steps if name == "train.max_steps" else one.num_train_epochs for one in (saved, now)
    )
    assert before is not None
    assert after is not None
    if after < before:
        return False, "what was trained beyond that is not undone" + _stretched(now)
    return True, "training goes on for longer" + _stretched(now)


def _stretched(train: TrainSpec) -> str:
    """What another number of updates does to the schedule."""
    schedule = train.lr_scheduler_type
    has_share = 0 < train.warmup_steps < 1
    only_warms_up = schedule in ("constant_with_warmup", "inverse_sqrt")
    if schedule in ("constant", "reduce_lr_on_plateau") or (only_warms_up and not has_share):
        return "; the learning rate does not depend on it"
    return (
        f"; {schedule} is spread over the new length, so from here on the learning rate is "
        "another, and the result is not that of a run planned so from the start"
    )


@dataclass(frozen=True)
class Fingerprints:
    """What training has used, as short texts that are equal only where it was the same."""

    base: str
    tokenizer: str
    chat_template: str
    data_train: str
    data_eval: str
    packages: str
    hardware: str
    compute: str = ""
    """The dtype that the products are computed in. Empty in checkpoints of earlier versions."""
    native_bf16: str = ""
    """Yes or no: what the machine was found to be, which decides what `auto` is."""


_FINGERPRINT_WORDS = {
    "base": "the base's weights are others: the adapter has learned on those of before",
    "tokenizer": "the tokenizer makes other ids of the same text",
    "chat_template": "the chat template makes another text of the same messages",
    "data_train": "the training rows are others, or in another order: some are seen twice or never",
    "data_eval": "the eval rows are others: losses before and after cannot be compared",
    "packages": "the same recipe may come out otherwise in the last bits",
    "hardware": "the same recipe may come out otherwise in the last bits",
    "compute": "the products are computed in another dtype, so all numbers are others",
    "native_bf16": "auto may stand for another dtype",
}
_ACCEPTED_FINGERPRINTS = ("packages", "hardware", "native_bf16")


def differences(saved: Fingerprints, now: Fingerprints) -> Drift:
    """What is not the same although the recipe may be: files change under their names."""
    changes = [
        Change(
            field.name,
            getattr(saved, field.name),
            getattr(now, field.name),
            _FINGERPRINT_WORDS[field.name],
        )
        for field in fields(Fingerprints)
        if getattr(saved, field.name) not in ("", getattr(now, field.name))
    ]
    return Drift(
        tuple(one for one in changes if one.field in _ACCEPTED_FINGERPRINTS),
        tuple(one for one in changes if one.field not in _ACCEPTED_FINGERPRINTS),
    )


def lines_of(drift: Drift) -> tuple[str, ...]:
    """The changes, one a line under a headline; nothing where there is none."""
    lines: list[str] = []
    for changes, headline in (
        (drift.accepted, "changed since the run was begun, and accepted:"),
        (drift.breaking, "changed since the run was begun, so that it is not the same run:"),
    ):
        if changes:
            lines += [headline, *(f"  - {change}" for change in changes)]
    return tuple(lines)


def refusal(drift: Drift, run_folder: str) -> str:
    """Why a run is not continued, and what can be done."""
    listed = "\n".join(f"  - {change}" for change in drift.breaking)
    return (
        f"{run_folder} was begun otherwise:\n{listed}\n"
        "Undo the changes, train into a new folder with --fresh, or go on all the same with "
        "--allow-drift."
    )


def _short(value: Any) -> str:
    if value is None:
        return "unset"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 2]} …"
