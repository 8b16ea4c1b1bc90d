"""What differs between the recipe that a run was begun with and the one it is continued with.

A change is accepted where training goes on exactly as it would have, or where that is what the
user asks for (more epochs). All others break the promise that a continued run is the
uninterrupted one, and a field that nobody has classified is among them. Of other names for the
data, the rows decide once they are read.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlora_kit.checkpoint.global_batch import GlobalBatch
from qlora_kit.recipe import Recipe, TrainSpec
from qlora_kit.recipe.base import Spec

_MAX_CHARACTERS = 60
_DIGEST = re.compile(r"[0-9a-f]{32,}")
_DIGEST_CHARACTERS = 12

_AFTER_TRAINING = "nothing reads it before training has ended"
_CHECKPOINTS = "checkpoints are written or kept otherwise from here on"
_LOG = "what is logged from here on"
_EVALUATIONS = "the loss on held-out rows is taken at other steps; training does not see it"

# Field → what comes of changing it: training does not notice.
HARMLESS: dict[str, str] = {
    "run_dir": "the same run in a folder of another name",
    "data.max_dropped_share": "only when the run would stop, not which rows are trained on",
    "train.gradient_checkpointing": "the same numbers for other memory and time",
    "train.fused_loss": "the numbers may differ by rounding, so not to the bit",
    "train.fused_lora": "the numbers may differ by rounding, so not to the bit",
    "train.fused_mlp": "the numbers may differ by rounding, so not to the bit",
    "train.fused_norm": "the numbers may differ by rounding, so not to the bit",
    "train.fused_rotary": "the numbers may differ by rounding, so not to the bit",
    "train.use_liger_kernel": "the numbers may differ by rounding, so not to the bit",
    "train.use_onednn": "the numbers may differ by rounding, so not to the bit",
    "train.blockwise_attention": "the numbers may differ by rounding, so not to the bit",
    "train.per_device_eval_batch_size": "the eval loss may differ by rounding",
    "train.logging_steps": _LOG,
    "train.report_to": _LOG,
    "train.save_strategy": _CHECKPOINTS,
    "train.save_steps": _CHECKPOINTS,
    "train.save_minutes": _CHECKPOINTS,
    "train.save_total_limit": _CHECKPOINTS,
    "train.keep_best": _CHECKPOINTS,
    "train.memory_budget": "other sequences at a time, so the numbers may differ by rounding",
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
    "train.warmup_steps": _RATE,
    "train.optim": "the other optimizer's state cannot be read: its running means are lost; the "
    "schedule goes on",
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
_SCHEDULE = ("train.learning_rate", "train.lr_scheduler_type", "train.lr_scheduler_kwargs")
# Fields whose verdict depends on both values, or on other fields.
WEIGHED = (*_BATCH, *_LENGTH, *_EVALUATING, *_SCHEDULE)

_PLATEAU = "reduce_lr_on_plateau"
# What the sources of the data are called and where they are; all that is in them below.
_SOURCES = ("data.train", "data.eval")
# What decides which tensors are trained, so that those of a checkpoint may have no place.
_TENSORS = (
    "lora.r",
    "lora.target_modules",
    "lora.exclude_modules",
    "lora.use_dora",
    "lora.rank_pattern",
    "lora.modules_to_save",
    "lora.new_tokens",
    "quantization_aware.train",
)
_OTHER_TENSORS = "other tensors are trained: those of the checkpoint have no place among them"

_SAME_ROWS = "the rows are the same, token by token and in the same order"


@dataclass(frozen=True)
class Change:
    """Something that is not as it was, and what comes of that."""

    field: str
    before: Any
    now: Any
    consequence: str
    detail: str = ""
    """In place of the two values, where those say nothing to people."""
    is_possible: bool = True
    """False where nobody can go on from the checkpoint, whatever is allowed."""

    @property
    def difference(self) -> str:
        told = self.detail or f"{_short(self.before)} → {_short(self.now)}"
        return f"{self.field}: {told}"

    def __str__(self) -> str:
        return f"{self.difference} ({self.consequence})"


@dataclass(frozen=True)
class Drift:
    """Changes that training can go on with, and those that make it another run."""

    accepted: tuple[Change, ...] = ()
    breaking: tuple[Change, ...] = ()
    undecided: tuple[Change, ...] = ()
    """Other names for the data, which are accepted where the rows turn out to be the same."""

    def __add__(self, other: Drift) -> Drift:
        return Drift(
            self.accepted + other.accepted,
            self.breaking + other.breaking,
            self.undecided + other.undecided,
        )

    @property
    def all(self) -> tuple[Change, ...]:
        return self.accepted + self.undecided + self.breaking

    def decided(self, same_parts: Container[str] = ()) -> Drift:
        """Of `train` and `eval`, those in `same_parts` have the same rows as before."""
        is_same = [one.field.split(".")[1] in same_parts for one in self.undecided]
        told = list(zip(self.undecided, is_same, strict=True))
        return Drift(
            self.accepted
            + tuple(replace(one, consequence=_SAME_ROWS) for one, same in told if same),
            self.breaking + tuple(one for one, same in told if not same),
        )


@dataclass(frozen=True)
class _Sides:
    """The two recipes, and the sequences that an update trains on by each."""

    saved: Recipe
    now: Recipe
    batch_before: int
    batch_now: int
    num_processes: int

    @property
    def is_noisy(self) -> bool:
        """Whether training draws random numbers."""
        return self.now.lora.dropout > 0 or self.now.train.neftune_noise_alpha is not None


def compare(
    saved: Recipe, now: Recipe, begun: GlobalBatch | None = None, num_processes: int = 1
) -> Drift:
    """Field by field, under the dotted names of the recipe, and the number of processes.
    `train.optim: auto` is the saved recipe's, on whatever device that was begun.

    Args:
        begun: of the checkpoint that is gone on from; None where there is none, so that the
            number of processes is what it is now.
        num_processes: those that train now.
    """
    before = begun or GlobalBatch(
        _per_process(saved.train) * num_processes, _per_process(saved.train), num_processes
    )
    after = before.from_here_on(_per_process(now.train), num_processes)
    sides = _Sides(saved, now, before.items_per_update, after, num_processes)
    drift = _of_processes(before, sides)
    for field, one, other in _differences(saved, now.with_optimizer(saved.train.optim), ""):
        drift += _verdict(field, one, other, sides)
    return drift


def _per_process(train: TrainSpec) -> int:
    return train.per_device_train_batch_size * train.gradient_accumulation_steps


def _of_processes(before: GlobalBatch, sides: _Sides) -> Drift:
    """Another number of them, which nobody has to ask for: it is how training was launched."""
    if before.num_processes == sides.num_processes:
        return Drift()
    kept = (
        f"an update still trains on the same {sides.batch_now} sequences, in the same order; "
        if sides.batch_now == sides.batch_before
        else ""
    )
    draws = (
        "; each process had a random state of its own, which is not put back: dropout and noise "
        "are drawn anew from the seed"
        if sides.is_noisy
        else ""
    )
    consequence = f"{kept}the numbers differ by rounding{draws}"
    return Drift((Change("processes", before.num_processes, sides.num_processes, consequence),))


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


def _verdict(field: str, before: Any, now: Any, sides: _Sides) -> Drift:
    """One change, with what comes of it, in its place."""
    name = re.sub(r"\.\d+(?=\.|$)", "", field)  # data.train.0.path is data.train.path
    saved, asked = sides.saved.train, sides.now.train
    is_accepted = False
    if name in HARMLESS:
        is_accepted, consequence = True, HARMLESS[name]
    elif name in _BATCH:
        is_accepted, consequence = _batch_verdict(sides)
    elif name in _LENGTH:
        is_accepted, consequence = _length_verdict(name, saved, asked)
    elif name in _SCHEDULE:
        consequence = _schedule_consequence(name, saved, asked)
    elif name in _EVALUATING:
        is_accepted = _PLATEAU not in (saved.lr_scheduler_type, asked.lr_scheduler_type)
        consequence = _EVALUATIONS if is_accepted else _RATE
    else:
        consequence = BREAKING.get(name) or BREAKING.get(name.partition(".")[0], _UNKNOWN)
    is_possible = not _needs_other_tensors(name, sides)
    if not is_possible:
        consequence = _OTHER_TENSORS
    change = (Change(field, before, now, consequence, is_possible=is_possible),)
    # Of a stream nobody knows the rows before they are trained on.
    if ".".join(name.split(".")[:2]) in _SOURCES and not sides.now.data.streaming:
        return Drift(undecided=change)
    return Drift(accepted=change) if is_accepted else Drift(breaking=change)


def _needs_other_tensors(name: str, sides: _Sides) -> bool:
    """Whether a field changes which tensors are trained, or how the optimizer groups them."""
    if name == "train.loraplus_lr_ratio":
        return None in (sides.saved.train.loraplus_lr_ratio, sides.now.train.loraplus_lr_ratio)
    if name == "quantization_aware":  # it was, or is, not there
        specs = (sides.saved.quantization_aware, sides.now.quantization_aware)
        return any(spec is not None and spec.train == "full" for spec in specs)
    return name in _TENSORS


def _batch_verdict(sides: _Sides) -> tuple[bool, str]:
    before, after = sides.batch_before, sides.batch_now
    if before != after:
        each, processes = sides.now.train.per_device_train_batch_size, sides.num_processes
        accumulation = sides.now.train.gradient_accumulation_steps
        shares = f"{each} × {accumulation}" + f" on each of {processes} processes" * (processes > 1)
        whole, rest = divmod(before, each * processes)
        keeps = "" if rest else f"; gradient_accumulation_steps: {whole} keeps {before}"
        return False, (
            f"an update trains on {after} sequences ({shares}) instead of {before}, and the place "
            f"in the data, which is counted in updates, is another{keeps}"
        )
    draws = " and other draws of dropout or noise" if sides.is_noisy else ""
    return True, (
        f"an update still trains on the same {after} sequences, in the same order; the numbers "
        f"differ by rounding{draws}, so not to the bit"
    )


def _schedule_consequence(name: str, saved: TrainSpec, now: TrainSpec) -> str:
    was, becomes = saved.lr_scheduler_type == _PLATEAU, now.lr_scheduler_type == _PLATEAU
    if was and becomes:
        return f"{_RATE}; by how much it was lowered so far stays"
    if name != "train.lr_scheduler_type" or was == becomes:
        return _RATE
    if becomes:
        return f"{_RATE}: it begins at train.learning_rate, and no eval loss is known to it"
    return (
        f"{_RATE}: {now.lr_scheduler_type} goes on at the update reached, as if it had been the "
        "schedule from the start, and by how much the rate was lowered is forgotten"
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
    if any(not change.is_possible for change in drift.breaking):
        return (
            f"{run_folder} was begun otherwise:\n{listed}\n"
            "Undo the changes, or train into a new folder with --fresh; --allow-drift cannot help."
        )
    return (
        f"{run_folder} was begun otherwise:\n{listed}\n"
        "Undo the changes, train into a new folder with --fresh, or go on all the same with "
        "--allow-drift."
    )


def _short(value: Any) -> str:
    """A value as a message may hold it."""
    if value is None:
        return "unset"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if _DIGEST.fullmatch(text):
        return text[:_DIGEST_CHARACTERS]
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 2]} …"
