"""Where every row and every token went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

NUM_SHOWN = 3
TRUNCATED = "truncated"
END_CUT = "the end token of an answer was cut off"


@dataclass
class Ledger:
    """Counts for one part (train or eval). Every row is in one bucket, every token in one.

    Of the rows, some are kept (a few of those truncated or split), some dropped because they
    cannot be used, some set aside by a rule of the recipe (a duplicate, a row that is also an
    eval row, one that is held out). Of the tokens that were rendered, and those that were
    repeated, some are supervised, some context, some cut off a kept row, and some went with a
    dropped row. A row that could not be rendered has no tokens.
    """

    num_rows: int = 0
    num_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Faulty rows, by what is wrong with them; too many stop the run."""
    set_aside: Counter[str] = field(default_factory=Counter)
    """Sound rows that a rule of the recipe leaves out, by that rule."""
    truncated: int = 0
    ends_cut: int = 0
    """Truncated rows that lost the token which ends an answer: it is not seen to stop there."""
    split: int = 0
    """Rows cut into several sequences."""
    num_sequences: int = 0
    supervised_tokens: int = 0
    context_tokens: int = 0
    cut_tokens: int = 0
    dropped_tokens: int = 0
    rendered_tokens: int = 0
    """Tokens of all rows before anything was dropped, cut or repeated."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Of those rows: how many have how many tokens."""
    repeated_tokens: int = 0
    """Context tokens that a split row has twice, so that each of its tokens is predicted."""
    undrawn_tokens: int = 0
    """Tokens of kept rows that the mix of sources, or a stream that ended, did not come to."""
    redrawn_tokens: int = 0
    """Tokens that a pass has once more, from sources that are drawn from again."""
    padding_tokens: int = 0
    """What fills packed sequences up; batches that are not packed are filled as they come."""
    noted: Counter[str] = field(default_factory=Counter)
    """What else should be known of rows that were kept, and of how many."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason → origins of up to three rows."""
    schemas: dict[str, str] = field(default_factory=dict)
    """Source → the schema of its rows."""
    ignored: dict[str, list[str]] = field(default_factory=dict)
    """Source → keys of its rows that are not read."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Source → files of its folder that are not read, each with the reason."""

    rows_of: Counter[str] = field(default_factory=Counter)
    """Source → its rows, those at fault too."""
    repeats: dict[str, dict[str, int]] = field(default_factory=dict)
    """Source → file → how many of its rows are the same as earlier ones of that file."""

    def drop(self, reason: str, origin: str, detail: str = "", num_tokens: int = 0) -> None:
        self.dropped[reason] += 1
        self.dropped_tokens += num_tokens
        self.example(reason, f"{origin} ({detail})" if detail else origin)

    def put_aside(self, rule: str, origin: str) -> None:
        self.set_aside[rule] += 1
        self.example(rule, origin)

    def note(self, reason: str, origin: str) -> None:
        self.noted[reason] += 1
        self.example(reason, origin)

    def repeat(self, source: str, first: str) -> None:
        """Count a row that says the same as the row at `first`."""
        counts = self.repeats.setdefault(source, {})
        file = first.rpartition(":")[0]
        counts[file] = counts.get(file, 0) + 1

    def example(self, reason: str, origin: str) -> None:
        shown = self.examples.setdefault(reason, [])
        if len(shown) < NUM_SHOWN:
            shown.append(origin)

    def add(self, other: Ledger) -> None:
        """Book what another ledger has booked."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, int):
                setattr(self, one.name, mine + theirs)
        for reason, origins in other.examples.items():
            for origin in origins:
                self.example(reason, origin)
        self.schemas |= other.schemas
        self.ignored |= other.ignored
        self.left_out |= other.left_out
        for source, counts in other.repeats.items():
            repeated = Counter(self.repeats.get(source, {}))
            repeated.update(counts)
            self.repeats[source] = dict(repeated)

    @property
    def num_lost(self) -> int:
        """Rows dropped or truncated."""
        return sum(self.dropped.values()) + self.truncated

    def findings(self) -> list[str]:
        """What became of rows that were not simply kept: how many, and where to look."""
        counts = [
            *((reason, count, f"dropped, {reason}") for reason, count in self.dropped.items()),
            *((rule, count, f"set aside, {rule}") for rule, count in self.set_aside.items()),
            (TRUNCATED, self.truncated, TRUNCATED),
            (END_CUT, self.ends_cut, END_CUT),
            *((note, count, note) for note, count in self.noted.items()),
        ]
        found = [
            f"{count:,} of {self.num_rows:,} rows: {what}{self._shown(reason, count)}"
            for reason, count, what in counts
            if count
        ]
        return found + self._emptied()

    def _emptied(self) -> list[str]:
        """Sources, where there are several, that duplicates leave less than half of."""
        found = []
        for source, counts in self.repeats.items():
            num_rows, num_repeated = self.rows_of[source], sum(counts.values())
            if len(self.rows_of) > 1 and 2 * num_repeated > num_rows > 0:
                most = sorted(counts.items(), key=lambda one: -one[1])[:NUM_SHOWN]
                files = ", ".join(f"{count:,} of {file}" for file, count in most)
                found.append(
                    f"{num_repeated:,} of the {num_rows:,} rows of {source} are the same as "
                    f"earlier ones ({files}): at most {num_rows - num_repeated:,} are left, and a "
                    "weight in a mix holds for these (data.duplicates: keep keeps all)"
                )
        return found

    def _shown(self, reason: str, count: int) -> str:
        shown = self.examples.get(reason)
        if not shown:
            return ""
        return f" ({', '.join(shown)}" + (", …)" if count > NUM_SHOWN else ")")

    def check_balance(self) -> None:
        """Assert that no row and no token is missing from the sums."""
        out = sum(self.dropped.values()) + sum(self.set_aside.values())
        assert self.num_rows == self.num_kept + out, "rows do not balance"
        given = self.rendered_tokens + self.repeated_tokens
        found = self.supervised_tokens + self.context_tokens + self.cut_tokens
        assert given == found + self.dropped_tokens + self.undrawn_tokens, "tokens do not balance"

    def leave_out(self, rule: str, num_rows: int, num_supervised: int, num_context: int) -> None:
        """Move kept rows that a pass does not come to into a bucket of their own."""
        self.num_kept -= num_rows
        self.set_aside[rule] += num_rows
        self.supervised_tokens -= num_supervised
        self.context_tokens -= num_context
        self.undrawn_tokens += num_supervised + num_context

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": {
                "read": self.num_rows,
                "kept": self.num_kept,
                "dropped": dict(self.dropped),
                "set_aside": dict(self.set_aside),
                "truncated": self.truncated,
                "ends_cut": self.ends_cut,
                "split": self.split,
                "noted": dict(self.noted),
            },
            "sequences": self.num_sequences,
            "tokens": {
                "rendered": self.rendered_tokens,
                "repeated": self.repeated_tokens,
                "supervised": self.supervised_tokens,
                "context": self.context_tokens,
                "cut": self.cut_tokens,
                "dropped": self.dropped_tokens,
                "undrawn": self.undrawn_tokens,
                "drawn_again": self.redrawn_tokens,
                "padding": self.padding_tokens,
            },
            "examples": self.examples,
            "schemas": self.schemas,
            "ignored_keys": self.ignored,
            "files_left_out": self.left_out,
            "sources": {
                name: {"rows": count, "repeats": self.repeats.get(name, {})}
                for name, count in self.rows_of.items()
            },
        }

    def state(self) -> dict[str, Any]:
        """All of it, for a cache; `from_state` gives it back."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Ledger:
        counters = ("dropped", "set_aside", "noted", "rows_of")
        lengths = Counter({int(length): count for length, count in state["lengths"].items()})
        named = {name: Counter(state[name]) for name in counters}
        return cls(**{**state, **named, "lengths": lengths})
