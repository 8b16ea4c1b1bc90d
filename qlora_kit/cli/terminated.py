"""SIGTERM as an exception, so that what a verb has begun is put away as it is after Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# `timeout` and launchers send it to a process and to its group: within this time it is one.
_ECHO_SECONDS = 1.0


class Terminated(SystemExit):
    """Nothing that handles errors of the work takes it for one."""


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within the block, the signal raises.

    A library that is at work outside Python is first let finish, as with Ctrl-C. Processes that
    are forked off end at once. Outside the main thread, where there can be no handler, nothing
    changes.

    Raises:
        Terminated: with 128 and the signal's number as the exit code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, raised_at = os.getpid(), float("-inf")

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal raised_at
        if os.getpid() != owner:
            os._exit(128 + number)
        now = time.monotonic()
        if now - raised_at < _ECHO_SECONDS:
            return
        raised_at = now
        raise Terminated(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def left_as_it_was(number: int) -> Iterator[None]:
    """Put a signal's handler back at the end, for whoever calls the command line from Python."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, before)
