"""Where every row and every token went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """Counts for one part (train or eval). Every row is in one bucket, every token in one."""

    num_rows: int = 0
    num_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    split: int = 0
    """Plain texts cut into several sequences, losing nothing."""
    num_sequences: int = 0
    supervised_tokens: int = 0
    context_tokens: int = 0
    cut_tokens: int = 0
    dropped_tokens: int = 0
    rendered_tokens: int = 0
    """Tokens of all rows before anything was dropped or cut; the others add up to it."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason → origins of up to three rows."""

    def note(self, reason: str, origin: str) -> None:
        shown = self.examples.setdefault(reason, [])
        if len(shown) < 3:
            shown.append(origin)

    @property
    def num_lost(self) -> int:
        """Rows dropped or truncated."""
        return sum(self.dropped.values()) + self.truncated

    def check_balance(self) -> None:
        """Assert that no row and no token is missing from the sums."""
        assert self.num_rows == self.num_kept + sum(self.dropped.values()), (
            "rows do not balance"
        )
        tokens = (
            self.supervised_tokens
            + self.context_tokens
            + self.cut_tokens
            + self.dropped_tokens
        )
        assert self.rendered_tokens == tokens, "tokens do not balance"

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": {
                "read": self.num_rows,
                "kept": self.num_kept,
                "dropped": dict(self.dropped),
                "truncated": self.truncated,
                "split": self.split,
            },
            "sequences": self.num_sequences,
            "tokens": {
                "rendered": self.rendered_tokens,
                "supervised": self.supervised_tokens,
                "context": self.context_tokens,
                "cut": self.cut_tokens,
                "dropped": self.dropped_tokens,
            },
            "examples": self.examples,
        }
