"""Where the core says things. The command line shows them; a library user need not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Progress:
    """One piece of work under way. This one shows nothing."""

    def begin_at(self, done: int) -> None:
        """So many parts were done before, and say nothing about how long the others take."""

    def update(self, advance: int = 1, **fields: str) -> None:
        """Go on by `advance`; `fields` are figures to show, such as loss="1.23"."""


class Reporter:
    """Says nothing; the command line's own shows everything on the terminal."""

    def say(self, text: str) -> None:
        """One line of what is being done or was found."""

    def warn(self, text: str) -> None:
        """Something that goes on, but that the user should know."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Figures side by side; the first column names the row."""

    def marked(self, runs: Sequence[tuple[str, bool]], prefix: str = "") -> None:
        """Text in stretches, each with whether it is trained on."""

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Progress]:
        """Work of `total` parts, shown while the context lasts."""
        yield Progress()


SILENT = Reporter()
