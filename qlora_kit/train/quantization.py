"""When quantization sets in, in a training that is aware of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_kit.errors import TrainingError

if TYPE_CHECKING:
    from qlora_kit.model.qat.linear import FakeQuantization


class QuantizationStart(TrainerCallback):
    """Off for the first updates, as `quantization_aware.start_after` says, then on for good.

    It depends on the number of the update alone, so a resumed run does as the uninterrupted one.

    Raises:
        TrainingError: it would never set in.
    """

    def __init__(self, quantization: FakeQuantization, num_updates: int):
        self.quantization = quantization
        self.first_update = quantization.aware.spec.first_update(num_updates)
        if self.first_update >= num_updates:
            raise TrainingError(
                f"quantization_aware.start_after leaves the first {self.first_update} updates "
                f"unquantized, and there are only {num_updates}; lower it, or train for longer."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.quantization.is_on = state.global_step >= self.first_update

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.quantization.is_on = True
