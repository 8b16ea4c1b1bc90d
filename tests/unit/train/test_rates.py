"""What a changed recipe makes of the learning rates that a run had reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LRScheduler, ReduceLROnPlateau

from qlora_kit.train.rates import go_on

# Reduced at every evaluation but the first: no loss is ever better than that one.
PLATEAU: dict[str, Any] = {
    "patience": 0,
    "factor": 0.5,
    "threshold": 1e9,
    "threshold_mode": "abs",
}


class Training:
    """An optimizer of two groups, and a schedule."""

    def __init__(self, rate: float = 1e-2, **arguments: Any):
        groups = [{"params": [torch.zeros(1)], "lr": rate * times} for times in (1, 16)]
        self.optimizer = torch.optim.SGD(groups, lr=rate)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.schedule: LRScheduler = (
            ReduceLROnPlateau(self.optimizer, **{**PLATEAU, **arguments})
            if "by_updates" not in arguments
            else LambdaLR(self.optimizer, lambda update: 1 / (1 + update))
        )

    def evaluated(self, times: int) -> list[float]:
        """Rates of the first group after each evaluation."""
        rates = []
        for _ in range(times):
            assert isinstance(self.schedule, ReduceLROnPlateau)
            self.schedule.step(1.0)
            rates.append(self.rates[0])
        return rates

    def goes_on_from(self, other: Training, update: int = 5) -> None:
        groups = self.optimizer.param_groups
        saved_groups = other.optimizer.state_dict()["param_groups"]
        go_on(self.schedule, groups, other.schedule.state_dict(), saved_groups, update)

    @property
    def rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


@pytest.mark.parametrize(
    ("now", "reached", "rates"),
    [
        ({}, 5e-3, [2.5e-3, 1.25e-3, 6.25e-4]),
        ({"rate": 1e-3}, 5e-4, [2.5e-4, 1.25e-4, 6.25e-5]),
        ({"factor": 0.1}, 5e-3, [5e-4, 5e-5, 5e-6]),
        ({"patience": 1}, 5e-3, [5e-3, 2.5e-3, 2.5e-3]),
        ({"cooldown": 1}, 5e-3, [2.5e-3, 2.5e-3, 1.25e-3]),
        ({"min_lr": 8e-3}, 8e-3, [8e-3] * 3),
        ({"min_lr": 1.0}, 1e-2, [1e-2] * 3),  # more than the rate: it was never lowered
        ({"threshold": -1e9}, 5e-3, [5e-3] * 3),
        # The lowest loss so far is no measure of the highest.
        ({"mode": "max"}, 5e-3, [5e-3, 2.5e-3, 1.25e-3]),
    ],
)
def test_lowered_by_the_eval_loss(now: dict[str, Any], reached: float, rates: list[float]) -> None:
    begun, later = Training(), Training(**now)
    begun.evaluated(2)
    later.goes_on_from(begun)
    assert later.rates[0] == pytest.approx(reached)
    assert later.schedule.last_epoch == 2
    assert later.evaluated(3) == pytest.approx(rates)


def test_the_same_settings_give_the_same_bits() -> None:
    begun, later = Training(0.3, factor=0.7), Training(0.3, factor=0.7)
    begun.evaluated(5)
    later.goes_on_from(begun)
    assert later.rates == begun.rates
    assert later.evaluated(5) == begun.evaluated(5)


def test_a_shorter_cooldown_ends_sooner() -> None:
    begun, later = Training(cooldown=9), Training(cooldown=1)
    begun.evaluated(2)
    later.goes_on_from(begun)
    assert later.evaluated(3) == pytest.approx([5e-3, 2.5e-3, 2.5e-3])


def test_each_group_keeps_its_own_share() -> None:
    begun, later = Training(), Training(1e-3)
    begun.evaluated(3)
    begun.optimizer.param_groups[1]["lr"] = 16e-2
    later.goes_on_from(begun)
    assert later.rates == pytest.approx([2.5e-4, 16e-3])


# Nothing is trained here.
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_one_by_the_eval_loss_begins_where_the_other_went_by_updates() -> None:
    begun, later = Training(by_updates=True), Training(1e-3)
    begun.schedule.step()  # type: ignore[call-arg]
    later.goes_on_from(begun)
    assert later.rates == pytest.approx([1e-3, 16e-3])
    assert later.evaluated(2) == pytest.approx([1e-3, 5e-4])


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_one_by_updates_stands_at_the_update_reached() -> None:
    begun, later = Training(), Training(1e-3, by_updates=True)
    begun.evaluated(3)
    later.goes_on_from(begun, update=3)
    assert later.rates == pytest.approx([1e-3 / 4, 16e-3 / 4])
    assert later.schedule.get_last_lr() == later.rates
    later.schedule.step()  # type: ignore[call-arg]
    assert later.rates == pytest.approx([1e-3 / 5, 16e-3 / 5])


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_any_other_takes_back_its_state() -> None:
    begun, later = Training(), Training()
    begun.schedule = ConstantLR(begun.optimizer, total_iters=9)
    begun.schedule.step()
    later.schedule = ConstantLR(later.optimizer, total_iters=9)
    later.goes_on_from(begun)
    assert later.schedule.last_epoch == 1
