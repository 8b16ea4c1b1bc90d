"""Learning-rate schedules, and which further arguments each takes.

Upstream builds the schedule after the model is loaded, and refuses a wrong argument only then.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Literal

from qlora_kit.errors import Fault

DEFAULT_WARMUP = 0.03

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]

_SHAPES = ("linear", "cosine", "1-sqrt")

# The texts an argument may be, or (): a number.
SCHEDULE_ARGUMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "linear": {},
    "cosine": {"num_cycles": ()},
    "cosine_with_restarts": {"num_cycles": ()},
    "polynomial": {"lr_end": (), "power": ()},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": ()},
    "reduce_lr_on_plateau": {
        "mode": ("min", "max"),
        "factor": (),
        "patience": (),
        "threshold": (),
        "threshold_mode": ("rel", "abs"),
        "cooldown": (),
        "min_lr": (),
        "eps": (),
    },
    "cosine_with_min_lr": {"num_cycles": (), "min_lr": (), "min_lr_rate": ()},
    "cosine_warmup_with_min_lr": {
        "num_cycles": (),
        "min_lr": (),
        "min_lr_rate": (),
        "warmup_lr_rate": (),
    },
    "warmup_stable_decay": {
        "num_decay_steps": (),
        "warmup_type": _SHAPES,
        "decay_type": _SHAPES,
        "min_lr_ratio": (),
        "num_cycles": (),
    },
}

_UNWARMED = ("constant", "reduce_lr_on_plateau")


def schedule_faults(
    schedule: Schedule,
    arguments: Mapping[str, float | int | str | bool],
    *,
    learning_rate: float,
    warmup_steps: float,
) -> Iterator[Fault]:
    """What is wrong with `train.lr_scheduler_kwargs`, and with a warm-up the schedule lacks."""
    known = SCHEDULE_ARGUMENTS[schedule]
    for name, value in arguments.items():
        if name not in known:
            yield _unknown_argument(schedule, name)
        elif known[name] and value not in known[name]:
            message = f"must be one of {', '.join(known[name])}; got {value!r}"
            yield Fault(f"lr_scheduler_kwargs.{name}", message)
        elif not known[name] and isinstance(value, str | bool):
            yield Fault(f"lr_scheduler_kwargs.{name}", f"must be a number, got {value!r}")
    if schedule in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        given = [name for name in ("min_lr", "min_lr_rate") if name in arguments]
        if len(given) != 1:
            got = "both" if given else "neither"
            message = f"{schedule} needs one of min_lr and min_lr_rate, got {got}"
            hint = "try lr_scheduler_kwargs: {min_lr_rate: 0.1}"
            yield Fault("lr_scheduler_kwargs", message, hint)
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in arguments:
        hint = "try lr_scheduler_kwargs: {num_decay_steps: 100}"
        yield Fault("lr_scheduler_kwargs", "warmup_stable_decay needs num_decay_steps", hint)
    lowest = arguments.get("lr_end", 0.0)
    if schedule == "polynomial" and isinstance(lowest, float | int) and lowest >= learning_rate:
        message = f"{lowest:g} is not below learning_rate ({learning_rate:g})"
        yield Fault("lr_scheduler_kwargs.lr_end", message, "lower it")
    if schedule in _UNWARMED and warmup_steps not in (0, DEFAULT_WARMUP):
        hint = "use constant_with_warmup" if schedule == "constant" else "remove it"
        yield Fault("warmup_steps", f"the schedule {schedule} has no warm-up", hint)


def _unknown_argument(schedule: str, name: str) -> Fault:
    path = f"lr_scheduler_kwargs.{name}"
    known = list(SCHEDULE_ARGUMENTS[schedule])
    if not known:
        return Fault(path, f"the schedule {schedule} takes no further arguments", "remove it")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(known)}"
    return Fault(path, f"the schedule {schedule} has no such argument", hint)
