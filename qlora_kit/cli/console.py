"""The terminal's side of a Reporter: lines, tables and a progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from qlora_kit.report.reporter import Progress, Reporter
from qlora_kit.report.visible import bracketed

# Without a terminal a line is printed this often, so that a log shows life and stays short.
_LOG_SECONDS = 15.0
_SHORT_SECONDS = 2.0
# How long the rest takes is told once the pace says something of it: the first parts are slower
# than all others, as buffers are made and code is loaded for them.
_PACE_SECONDS = 5.0
_PACE_SHARE = 0.05
_PACE_SURELY_SECONDS = 60.0
# Without a terminal there is no width to keep to; tables are given this many columns.
_LOG_WIDTH = 132


class _Bar(Progress):
    def __init__(self, bar: RichProgress, task: TaskID):
        self._bar = bar
        self._task = task

    def begin_at(self, done: int) -> None:
        self._bar.reset(self._task, completed=done, figures="", before=done)

    def update(self, advance: int = 1, **fields: str) -> None:
        self._bar.update(self._task, advance=advance, figures="  ".join(fields.values()))


class _Lines(Progress):
    """Progress where there is no terminal to redraw: now and then a line."""

    def __init__(self, console: Console, name: str, total: int):
        self._console = console
        self._name = name
        self._total = total
        self._done = self._shown = self._before = 0
        self._fields: dict[str, str] = {}
        self._start = self._last = time.monotonic()

    def begin_at(self, done: int) -> None:
        self._done = self._shown = self._before = done
        self._start = time.monotonic()

    def update(self, advance: int = 1, **fields: str) -> None:
        self._done += advance
        self._fields = fields
        now = time.monotonic()
        if now - self._last < _LOG_SECONDS:
            return
        self._last = now
        self._show(now, fields)

    def finish(self) -> None:
        """Show the last figures, unless they were shown or the work was too short to need any."""
        now = time.monotonic()
        if self._shown < self._done and now - self._start > _SHORT_SECONDS:
            self._show(now, self._fields)

    def _show(self, now: float, fields: dict[str, str]) -> None:
        self._shown = self._done
        rest, made = max(self._total - self._done, 0), max(self._done - self._before, 1)
        seconds = now - self._start
        figures = [value for value in fields.values() if value]
        if tells_time_left(seconds, made, rest):
            figures.append(f"{clock(seconds * rest / made)} left")
        line = "  ".join([f"{self._name}: {self._done:,} of {self._total:,}", *figures])
        self._console.print(Text(line), soft_wrap=True)


class _TimeLeft(TimeRemainingColumn):
    """Nothing until the pace says something of the rest."""

    def render(self, task: Task) -> Text:
        made = task.completed - task.fields["before"]
        if not tells_time_left(task.elapsed or 0.0, made, task.remaining or 0.0):
            return Text("")
        return super().render(task)


def tells_time_left(seconds: float, made: float, rest: float) -> bool:
    """Whether `made` parts in so many seconds say how long the rest takes."""
    if seconds < _PACE_SECONDS:
        return False
    return made >= _PACE_SHARE * (made + rest) or seconds >= _PACE_SURELY_SECONDS


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ConsoleReporter(Reporter):
    """Shows everything on a terminal, or as plain lines in a file."""

    def __init__(self, console: Console):
        self._console = console

    def say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        self._console.print(Text(f"warning   {text}", style="yellow"), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._console.print(table)

    def marked(self, runs: Sequence[tuple[str, bool]], prefix: str = "") -> None:
        """Trained on in green; between ⟦ and ⟧ where there are no colours."""
        if self._console.color_system is None or self._console.no_color:
            self.say(prefix + bracketed(runs))
            return
        text = Text(prefix)
        for piece, supervised in runs:
            text.append(piece, style="bold green" if supervised else "")
        self._console.print(text, soft_wrap=True)

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Progress]:
        if not self._console.is_terminal:
            lines = _Lines(self._console, name, total)
            yield lines
            lines.finish()
            return
        bar = RichProgress(
            TextColumn("{task.description:9}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            _TimeLeft(),
            console=self._console,
        )
        with bar:
            yield _Bar(bar, bar.add_task(name, total=total, figures="", before=0))


def console_reporter(to_stderr: bool = False) -> ConsoleReporter:
    """The reporter of a verb; with --json, figures alone go to standard output."""
    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=to_stderr, highlight=False, width=_LOG_WIDTH)
    return ConsoleReporter(console)
