"""What a disk that is full or broken says, in few words."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qlora_kit.errors import DiskError

_REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    # Of a disk that was taken away, a network's among them.
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EREMOTEIO,
)
# How writers in Rust and C++ say it; there is no errno in their errors.
_RUST = re.compile(r"([^:]*) \(os error (\d+)\)")
_TORCH = ("inline_container", "PytorchStreamWriter")


def refusal_of(error: Exception) -> DiskError | None:
    """What to raise instead; None where it is no fault of the disk."""
    said = said_by_the_disk(error)
    return None if said is None else DiskError(f"the disk refuses: {said}. Make room or mend it.")


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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let what the disk refuses within the block name this file or folder: what cannot be written
    names none by itself, or the draft of it.
    """
    try:
        yield
    except OSError as error:
        is_draft = f".{path.name}." in str(error.filename)
        if error.errno in _REFUSALS and (error.filename is None or is_draft):
            error.filename = str(path)
        raise
    except SafetensorError as error:
        if (found := _RUST.search(str(error))) is None:
            raise
        raise OSError(int(found[2]), found[1].strip(), str(path)) from error
