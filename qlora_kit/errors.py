"""What can go wrong, as one tree. Every fault a user can cause derives from QloraKitError.

QloraKitError
├── RecipeError       the recipe is at fault; holds every fault found, not only the first
├── DataError         a data source cannot be read, or has nothing to train on
│   └── RowRefused    one row cannot be rendered; it is dropped under a named reason and counted
├── ModelError        a base model cannot be found, read, or used as asked
├── AdapterError      an adapter is unreadable, or belongs to another base
├── ArtifactError     an exported folder has no record, or is not what its record says
├── HardwareError     the machine lacks what was asked for (a precision, memory, disk)
├── RunError          a run directory is taken, missing, or incomplete
│   └── DiskError     the disk does not take, or give, what a run writes there
├── CheckpointError   a checkpoint could not be written; says which earlier one is whole
├── TrainingError     training cannot go on (a loss or gradient that is not finite)
├── LaunchError       a launcher asks for what the recipe or the machine does not allow
├── ProcessLost       another process that took part in training has ended
└── RunStopped        a signal ended training, and a checkpoint was written

The command line turns each into one message and exit code 1. Our own bugs are `assert`s and
stay tracebacks. A measurement that misses its budget is not an error: it is a finding, and
verbs report it through their exit code.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass


class QloraKitError(Exception):
    """A fault the user can mend; its message says what, got, do."""

    is_told_elsewhere: bool = False
    """Whether another process of the same run meets it as well, and tells."""


class DataError(QloraKitError):
    """A data source that cannot be read or has nothing to train on."""


class ModelError(QloraKitError):
    """A base model that cannot be found, read, or used as asked."""


class AdapterError(QloraKitError):
    """An adapter that is unreadable or belongs to another base."""


class ArtifactError(QloraKitError):
    """An exported folder whose record is missing, damaged, or says something else."""


class HardwareError(QloraKitError):
    """The machine lacks what was asked for."""


class RunError(QloraKitError):
    """A run directory that is taken, missing, or incomplete."""


class DiskError(RunError):
    """A disk that is full, broken or gone."""


class CheckpointError(QloraKitError):
    """A checkpoint that could not be written."""


class TrainingError(QloraKitError):
    """Training cannot go on."""


class LaunchError(QloraKitError):
    """A launcher asks for what the recipe or the machine does not allow."""


class ProcessLost(QloraKitError):
    """Another process that took part in training has ended."""


class RunStopped(QloraKitError):
    """A signal ended training, after a checkpoint was written."""

    def __init__(self, signal_number: int, left_behind: str):
        self.signal_number = signal_number
        self.left_behind = left_behind
        super().__init__(left_behind)

    @property
    def signal_name(self) -> str:
        return signal.Signals(self.signal_number).name

    def __reduce__(self) -> tuple[type[RunStopped], tuple[int, str]]:
        return type(self), (self.signal_number, self.left_behind)


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a recipe.

    `path` is the dotted key (`lora.r`), empty for the file as a whole; `message` says what
    was expected and what was got; `hint`, where there is one, what to do.
    """

    path: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{where}{self.message}" + (f" ({self.hint})" if self.hint else "")


class RecipeError(QloraKitError):
    """Every fault found in one recipe."""

    def __init__(self, source: str, faults: list[Fault]):
        assert faults, "a RecipeError needs at least one fault"
        self.source = source
        self.faults = faults
        lines = "\n".join(f"  - {fault}" for fault in faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__(f"{source} has {count}:\n{lines}")

    def __reduce__(self) -> tuple[type[RecipeError], tuple[str, list[Fault]]]:
        return type(self), (self.source, self.faults)
