"""Learning rates of a run that goes on: what was reached, under the recipe as it is now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

Groups: TypeAlias = Sequence[dict[str, Any]]


def go_on(
    schedule: LRScheduler,
    groups: Groups,
    saved: Mapping[str, Any],
    saved_groups: Groups,
    update: int,
) -> None:
    """Let a schedule that was just made, and the rates of the optimizer's groups, go on where
    those of a checkpoint stood.

    A schedule by updates stands at the update of the one before it. One that lowers the rate by
    the eval loss keeps by how much it has, and what it has seen; it begins where the one before
    went by updates. Any other, which no recipe names, takes back its state as it is.

    Args:
        groups: of the optimizer, with `initial_lr` by the recipe as it is now.
        saved: state of the schedule in the checkpoint, of either kind.
        saved_groups: of the optimizer in the checkpoint.
        update: updates made.
    """
    was_by_loss = "num_bad_epochs" in saved
    if isinstance(schedule, LambdaLR):
        if was_by_loss:
            schedule.last_epoch, schedule._step_count = update, update + 1
        else:
            schedule.load_state_dict(dict(saved))
        _stand_by_updates(schedule, groups)
    elif isinstance(schedule, ReduceLROnPlateau):
        if was_by_loss:
            _recall(schedule, saved)
        _stand_by_loss(schedule, groups, saved_groups if was_by_loss else groups, was_by_loss)
    else:
        schedule.load_state_dict(dict(saved))


def _stand_by_updates(schedule: LambdaLR, groups: Groups) -> None:
    schedule.base_lrs = [group["initial_lr"] for group in groups]
    schedule._last_lr = [
        rate * factor(schedule.last_epoch)
        for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def _recall(schedule: ReduceLROnPlateau, saved: Mapping[str, Any]) -> None:
    """What the schedule has seen; the lowest loss says nothing to one that wants the highest."""
    schedule.last_epoch = saved["last_epoch"]
    schedule.cooldown_counter = min(saved["cooldown_counter"], schedule.cooldown)
    if saved["mode"] == schedule.mode:
        schedule.best, schedule.num_bad_epochs = saved["best"], saved["num_bad_epochs"]


def _stand_by_loss(
    schedule: ReduceLROnPlateau, groups: Groups, saved_groups: Groups, is_lowered: bool
) -> None:
    """Set the rates: lowered by the share that they were, but not below the recipe's floor."""
    for number, (group, lowest) in enumerate(zip(groups, schedule.min_lrs, strict=True)):
        rate = group["initial_lr"]
        then = saved_groups[number if number < len(saved_groups) else 0]
        reached = rate
        if is_lowered:
            is_same = then["initial_lr"] == rate
            reached = then["lr"] if is_same else rate * (then["lr"] / then["initial_lr"])
        group["lr"] = max(reached, min(lowest, rate))
    schedule._last_lr = [group["lr"] for group in groups]
