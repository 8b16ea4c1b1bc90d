"""What each step from the base to an export cost: perplexity, divergence and size, in one table.

What the trained graph says is recorded once; every other member of the chain is compared with
that record, on the same tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.checkpoint.run_directory import write_json
from qlora_kit.evaluate.divergence import Divergence, Recorded, compare_to_recorded
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from qlora_kit.runtime.protocol import Runtime

BATCH_SIZE = 64
TRAINED = "trained"
_FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One member of the chain. Figures are None where it could not be measured; `note` says why."""

    name: str
    perplexity: float | None = None
    kl_mean: float | None = None
    """Nats per token, from the trained graph to this one."""
    top1_agreement: float | None = None
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    note: str = ""
    artifact: str | None = None
    """The record's hash of the folder that was measured; None for what is no artifact."""

    @classmethod
    def of(
        cls, name: str, divergence: Divergence, runtime: Runtime, artifact: str | None = None
    ) -> Row:
        footprint = runtime.footprint()
        return cls(
            name,
            divergence.candidate_perplexity,
            divergence.kl_mean,
            divergence.top1_agreement,
            footprint.disk_bytes,
            footprint.memory_bytes,
            artifact=artifact,
        )


@dataclass
class Ledger:
    """The rows so far, and what the trained graph said that they are measured by."""

    recorded: Recorded
    adapter_sha256: str
    rows: list[Row]

    @property
    def measured_on(self) -> dict[str, Any]:
        """What the figures of two ledgers must share to stand in one table."""
        return {
            "adapter_sha256": self.adapter_sha256,
            "rows_sha256": windows_sha256(self.recorded),
            "num_tokens": self.recorded.num_tokens,
        }

    def find(self, name: str, artifact: str | None = None) -> Row | None:
        return next(
            (row for row in self.rows if row.name == name and row.artifact == artifact), None
        )

    def add(self, row: Row) -> Row:
        """One that is made again takes the place of the former."""
        self.rows = [one for one in self.rows if one.name != row.name]
        self.rows.append(row)
        return row

    def measure(
        self, name: str, runtime: Runtime, artifact: str | None = None, reporter: Reporter = SILENT
    ) -> Row:
        """Compare with the record; entries of the vocabulary that only one has are left out."""
        return Row.of(name, self.compare(name, runtime, reporter), runtime, artifact)

    def compare(self, name: str, runtime: Runtime, reporter: Reporter = SILENT) -> Divergence:
        with reporter.progress(f"measuring ({name})", self.recorded.num_tokens) as progress:
            return compare_to_recorded(
                runtime,
                self.recorded,
                batch_size=BATCH_SIZE,
                num_entries=min(self.recorded.vocab_size, runtime.vocab_size),
                progress=progress,
            )

    def chain(self, *names: str) -> list[Row]:
        """The rows of these names, in the order of the table."""
        return [row for row in self.rows if row.name in names]

    def keep(self, path: Path) -> None:
        """Write the table down for the next export."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            path, {"format": _FORMAT, "measured_on": self.measured_on, "rows": as_json(self.rows)}
        )


def kept_rows(path: Path, measured_on: Mapping[str, Any]) -> list[Row]:
    """The rows of an earlier export, where they were measured alike; else none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT or values["measured_on"] != measured_on:
            return []
        return [Row(**row) for row in values["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def windows_sha256(recorded: Recorded) -> str:
    """Of the tokens that are measured on, and which of them count."""
    digest = hashlib.sha256()
    for window in recorded.windows:
        digest.update(json.dumps([window.input_ids, window.labels]).encode())
    return digest.hexdigest()


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


COLUMNS = ("model", "perplexity", "KL", "same top token", "on disk", "in memory")


def cells(row: Row) -> list[str]:
    """One line of the table."""
    name = f"{row.name} ({row.note})" if row.note else row.name
    return [
        name,
        "–" if row.perplexity is None else f"{row.perplexity:.4g}",
        "–" if row.kl_mean is None else f"{row.kl_mean:.2g}",
        "–" if row.top1_agreement is None else f"{row.top1_agreement:.2%}",
        _megabytes(row.disk_bytes),
        _megabytes(row.memory_bytes),
    ]


def show(rows: Sequence[Row], num_tokens: int, reporter: Reporter) -> None:
    reporter.table(
        f"From the base to the exports, on {num_tokens:,} held-out tokens (KL from the trained "
        "model, nats per token)",
        COLUMNS,
        [cells(row) for row in rows],
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table for a model card."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _megabytes(num_bytes: int | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / 1e6:,.1f} MB"
