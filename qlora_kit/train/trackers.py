"""Experiment trackers that go on where the attempt before left off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_kit.environment import tensorboard_folder

if TYPE_CHECKING:
    from transformers.integrations.integration_utils import TensorBoardCallback


class Tensorboard(TrainerCallback):
    """Upstream's callback for one curve of all attempts; left out, with a warning, from where the
    disk does not take what it writes. The log has the same figures.
    """

    def __init__(self, run: Path, update: int, warn: Callable[[str], None]):
        self.folder = tensorboard_folder(run / "tensorboard")
        self.update = update
        self.warn = warn
        self._inner: TensorBoardCallback | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        with self._unless_refused():
            self._inner = _upstream(Path(self.folder), self.update)
            self._inner.on_train_begin(args, state, control, **more)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        if self._inner is not None:
            with self._unless_refused():
                self._inner.on_log(args, state, control, **more)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        if self._inner is not None:
            with self._unless_refused():
                self._inner.on_train_end(args, state, control, **more)

    @contextmanager
    def _unless_refused(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._inner = None
            self.warn(
                f"{self.folder} cannot be written ({error.strerror}); the curves end there, and "
                "log.jsonl goes on."
            )


def _upstream(folder: Path, update: int) -> TensorBoardCallback:
    """What was written after `update`, from which this attempt goes on, is not shown."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    writer = SummaryWriter(str(folder), purge_step=update + 1 if update else None)  # type: ignore[no-untyped-call]
    return TensorBoardCallback(writer)


@contextmanager
def told_in_the_foreground() -> Iterator[None]:
    """tensorboard writes in a thread, which prints what the disk refuses, though whoever logs next
    is told of it as well.
    """
    before = threading.excepthook

    def unless_of_the_disk(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            before(arguments)

    threading.excepthook = unless_of_the_disk
    try:
        yield
    finally:
        threading.excepthook = before
