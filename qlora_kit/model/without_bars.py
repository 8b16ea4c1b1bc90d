"""Loading, converting and quantizing without progress bars that have no switch.

compressed_tensors takes `show_progress`, which neither transformers nor llmcompressor hands on, and
sets tqdm's own switch (TQDM_DISABLE) aside; transformers shows one of its own for GGUF files.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TextIO

# As tqdm writes one: back to the start of the line, text, percent, bar, counts; of nothing to do
# the count alone.
_BAR = re.compile(r"^\r.*(\d+%\|.*\| \d+/\d+|\b0it) \[")


class _WithoutBars(io.TextIOBase):
    """Hands on what is written, but for bars and the end of their line."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._is_after_bar = False

    def write(self, text: str) -> int:
        is_bar = _BAR.match(text) is not None
        if not is_bar and not (self._is_after_bar and text in ("\n", "")):
            self._stream.write(text)
        self._is_after_bar = is_bar or (self._is_after_bar and text == "")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


@contextmanager
def without_bars() -> Iterator[None]:
    """Everything else that is written to stderr while the context lasts is shown."""
    with redirect_stderr(_WithoutBars(sys.stderr)):
        yield
