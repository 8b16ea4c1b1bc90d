"""What ends a run from outside, a signal or the disk, as a message that says what is kept."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from qlora_kit.checkpoint.run_directory import left_behind
from qlora_kit.errors import (
    CheckpointError,
    DiskError,
    HardwareError,
    ProcessLost,
    RunError,
    RunStopped,
)
from qlora_kit.refusals import refusal_of

if TYPE_CHECKING:
    from qlora_kit.recipe import Recipe
    from qlora_kit.train.requests import Requests


@contextmanager
def told_how_it_ends(recipe: Recipe, requests: Requests) -> Iterator[None]:
    """Around a whole run.

    Raises:
        RunStopped: SIGTERM came when no update was under way.
        DiskError: the disk did not take, or give, what it should; with what the run has kept.
        ProcessLost: another process that takes part is gone; with the same.
    """
    try:
        yield
    except KeyboardInterrupt:
        if requests.stop_signal in (None, signal.SIGINT):
            raise
        raise RunStopped(requests.stop_signal, left_behind(recipe)) from None
    except (DiskError, ProcessLost) as refused:
        refused.args = (f"{refused} {left_behind(recipe)}",)
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        refusal = refusal_of(error)
        if refusal is None:
            raise
        raise DiskError(f"{refusal} {left_behind(recipe)}") from error


@contextmanager
def saying_what_is_kept(recipe: Recipe) -> Iterator[None]:
    """Around training and what follows it: memory that runs out takes nothing that was saved.

    Raises:
        RunError: somebody deleted or moved the folder meanwhile.
    """
    try:
        yield
    except (FileNotFoundError, CheckpointError) as error:
        if Path(recipe.run_dir).exists():
            raise
        raise RunError(
            f"{recipe.run_dir} is gone: it was deleted or moved while the run was at work there. "
            "If it was moved, move it back, or name its new place with run_dir=…; the same "
            "command goes on with it. If it was deleted, the same command trains anew."
        ) from error
    except HardwareError as ended:
        ended.args = (f"{ended} {left_behind(recipe, needs_change=True)}",)
        raise
