"""What ends a run from outside, a signal or the disk, as a message that says what is kept."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from qlora_kit.checkpoint.run_directory import left_behind
from qlora_kit.errors import RunError, RunStopped

if TYPE_CHECKING:
    from qlora_kit.recipe import Recipe
    from qlora_kit.train.requests import Requests

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# How writers in Rust and C++ say it; there is no errno in their errors.
_RUST = re.compile(r"([^:]*) \(os error \d+\)")
_TORCH = ("inline_container", "PytorchStreamWriter")


@contextmanager
def told_how_it_ends(recipe: Recipe, requests: Requests) -> Iterator[None]:
    """Around a whole run.

    Raises:
        RunStopped: SIGTERM came when no update was under way.
        RunError: the disk did not take, or give, what it should.
    """
    try:
        yield
    except KeyboardInterrupt:
        if requests.stop_signal in (None, signal.SIGINT):
            raise
        raise RunStopped(requests.stop_signal, left_behind(recipe)) from None
    except (OSError, SafetensorError, RuntimeError) as error:
        said = said_by_the_disk(error)
        if said is None:
            raise
        raise RunError(
            f"the disk refuses: {said}. Make room or mend it. {left_behind(recipe)}"
        ) from error


def said_by_the_disk(error: Exception) -> str | None:
    """In few words; None where it is no fault of the disk."""
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}" if error.errno in _REFUSALS else None
    if isinstance(error, SafetensorError):
        match = _RUST.search(str(error))
        return match[1].strip() if match else None
    is_torch = any(word in str(error) for word in _TORCH)
    return "it did not take everything (torch)" if is_torch else None
