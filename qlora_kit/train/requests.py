"""What is asked of a run from outside while it trains: signals, and a file to save at once.

SIGTERM (a spot instance that is taken away, Slurm's `--signal=TERM@120`) and Ctrl-C end the run
after the update under way, with a checkpoint; a second Ctrl-C ends it at once. Launchers hand on
what Slurm or a terminal has sent to every process already, so one signal often comes twice: what
follows within a second is the same one, and a further SIGTERM never costs the checkpoint. SIGUSR1
saves, and training goes on.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from qlora_kit.errors import ProcessLost, QloraKitError

TRIGGER_FILE = "save-now"
_ECHO_SECONDS = 1.0


@dataclass
class Requests:
    """Flags that signals raise, and the training loop lowers."""

    trigger: Path
    """A file that asks for a checkpoint by being there; it is removed once there is one."""
    stop_signal: int | None = None
    _save: bool = False
    _is_blind: bool = False
    """Whether the file cannot be looked at, or not be removed."""
    _deferred: bool = field(default=False)
    """Whether a training loop is looking at the flags."""
    _stopped_at: float = -_ECHO_SECONDS
    """When the last signal to stop was heeded."""

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call.

        A disk that refuses to say is asked no more; to be saved on is what finds out about it.
        """
        asked, self._save = self._save, False
        if self._is_blind:
            return asked
        try:
            is_there = self.trigger.exists()
            if is_there:
                self.trigger.unlink(missing_ok=True)
        except OSError:
            self._is_blind = is_there = True
        return asked or is_there

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While training: signals wait for the end of the update."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == _SAVE:
            self._save = True
            return
        now = time.monotonic()
        if now - self._stopped_at < _ECHO_SECONDS:
            return
        if isinstance(sys.exc_info()[1], ProcessLost):
            return  # a launcher's, which ends all when one is lost: what is kept is told first
        self._stopped_at = now
        is_first = self.stop_signal is None
        if self._deferred and not is_first and number == signal.SIGTERM:
            return
        self.stop_signal = number
        if not (self._deferred and is_first):
            raise KeyboardInterrupt


_SAVE = getattr(signal, "SIGUSR1", None)


@contextmanager
def nothing_to_save_yet() -> Iterator[None]:
    """From the start of the command on: SIGUSR1, which asks for a checkpoint, does not end the
    process before there can be one.
    """
    if _SAVE is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(_SAVE, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(_SAVE, before)


@contextmanager
def listening(trigger: Path, *, ends_process: bool = False) -> Iterator[Requests]:
    """Requests whose signal handlers are in place within the block.

    Outside the main thread of a process, where there can be none, only the file is looked at.

    Args:
        ends_process: whether a fault that leaves the block ends the process with a message, which
            SIGTERM then does not come before: it is ignored from there on.
    """
    requests = Requests(trigger)
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    numbers = [one for one in (signal.SIGINT, signal.SIGTERM, _SAVE) if one is not None]
    before = {number: signal.signal(number, requests.on_signal) for number in numbers}
    try:
        yield requests
    except QloraKitError:
        if ends_process:
            before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
