"""What happens at each step besides training: the log, the progress bar, the memory watch."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from qlora_kit.processes import ALONE, Processes
from qlora_kit.refusals import naming
from qlora_kit.report.reporter import Progress, Reporter
from qlora_kit.startup import UNTIMED, Laps
from qlora_kit.train.memory import MemoryWatch

if TYPE_CHECKING:
    from qlora_kit.train.trainer import QloraTrainer

_MIB = 1024**2
_STEPS_BETWEEN_GROWTH_CHECKS = 20


class StepCallback(TrainerCallback):
    """Writes `log.jsonl` and drives the progress bar."""

    def __init__(
        self,
        log_path: Path,
        memory: MemoryWatch,
        reporter: Reporter,
        updates_per_pass: int,
        processes: Processes = ALONE,
        laps: Laps = UNTIMED,
    ):
        self.laps = laps
        self.processes = processes
        self.updates_per_pass = updates_per_pass
        self.log_path = log_path
        self.progress = Progress()
        self.memory = memory
        self.reporter = reporter
        self.trainer: QloraTrainer | None = None
        self._warned: set[str] = set()
        self._start = self._last_time = time.monotonic()
        self._last_tokens = 0
        self._seconds_before = 0.0
        self._rate = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        assert self.trainer is not None
        self._start = self._last_time = time.monotonic()
        self._seconds_before = self.trainer.progress.seconds
        self._last_tokens = self.trainer.progress.num_real_tokens
        if state.global_step:
            state.epoch = state.global_step / self.updates_per_pass
            self.progress.begin_at(state.global_step)
        self.laps.lap("checkpoint put back")

    @property
    def seconds(self) -> float:
        """Of training, with those of the attempts that this one goes on from."""
        return self._seconds_before + time.monotonic() - self._start

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        assert self.trainer is not None
        self.trainer.progress.update = state.global_step
        state.epoch = state.global_step / self.updates_per_pass
        self.laps.lap("first update")
        self.laps.end(self.log_path.parent)
        host, device = self.memory.step()
        now = time.monotonic()
        tokens = self.trainer.progress.num_real_tokens
        rate = (tokens - self._last_tokens) / max(now - self._last_time, 1e-9)
        self._rate = rate if self._rate == 0 else 0.8 * self._rate + 0.2 * rate
        self._last_time, self._last_tokens = now, tokens
        self.progress.update(
            1,
            loss=f"loss {self.trainer.progress.last_loss:.3f}",
            tokens=f"{self._rate:,.0f} tok/s",
            memory=f"{(device or host) / _MIB:,.0f} MiB",
        )
        if state.global_step % _STEPS_BETWEEN_GROWTH_CHECKS == 0:
            self._warn_of_growth()

    def _warn_of_growth(self) -> None:
        for where, slope in self.memory.growth_per_step().items():
            if where in self._warned:
                continue
            self._warned.add(where)
            points = {"host": self.memory.host_at_steps, "device": self.memory.device_at_steps}
            self.reporter.warn(
                f"{where} memory grows steadily, by {slope / _MIB:.2f} MiB a step "
                f"(now {points[where][-1] / _MIB:,.0f} MiB)."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        assert self.trainer is not None
        logs = logs or {}
        elapsed = self.seconds
        done = self.trainer.progress
        line = {
            "step": state.global_step,
            "epoch": state.epoch,
            **{name: _plain(value) for name, value in logs.items() if name != "epoch"},
            "tokens": done.num_real_tokens,
            "padding": done.num_padding_tokens,
            "tokens_per_second": round(done.num_real_tokens / max(elapsed, 1e-9), 1),
            "seconds": round(elapsed, 2),
            "host_bytes": self.memory.host_at_steps[-1] if self.memory.host_at_steps else None,
            "device_peak_bytes": self.memory.device_peaks.get("training"),
        }
        is_closing = "train_loss" in logs  # that one is written anew by every attempt
        self.processes.on_main(lambda: self._append(line, is_closing))

    def _append(self, line: dict[str, Any], is_closing: bool) -> None:
        assert self.trainer is not None
        with naming(self.log_path), self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            if not is_closing:
                self.trainer.progress.log_bytes = file.tell()


def _plain(value: Any) -> Any:
    number = float(value) if not isinstance(value, str | bool) and value is not None else value
    return None if isinstance(number, float) and not math.isfinite(number) else number
