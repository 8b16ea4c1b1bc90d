"""A preview of the data, for a terminal or a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qlora_kit.data.ledger import Ledger
from qlora_kit.data.pieces import Shown, runs
from qlora_kit.data.preview import LengthBin, Lengths, Packing, PartView, Preview
from qlora_kit.report.reporter import Reporter
from qlora_kit.report.visible import shortened, visible

if TYPE_CHECKING:
    from qlora_kit.data.trace import Fate

_BAR_WIDTH = 36
_EIGHTHS = "▏▎▍▌▋▊▉█"
_KEPT = {"train": "trained on", "eval": "evaluated"}
_MOST_KEYS = 8
_MOST_OF_A_RECORD = 600

Row = tuple[str, ...]


def preview(reporter: Reporter, found: Preview) -> None:
    """All of it, on two or three screens."""
    for part in found.parts:
        for source, schema in part.ledger.schemas.items():
            reporter.say(f"{part.name:5}  {visible(source)}: {visible(schema)}")
        for source, keys in part.ledger.ignored.items():
            reporter.say(f"       not read of {visible(source)}: {visible(first_few(keys))}")
        files_left_out(reporter, part.ledger)
    reporter.say("")
    ledgers = [part.ledger for part in found.parts]
    columns = [part.name for part in found.parts]
    reporter.table("Where every row went", ("", *columns), row_table(found.parts))
    reporter.say("")
    reporter.table("Where every token went", ("", *columns), token_table(ledgers))
    if any(part.ledger.findings() for part in found.parts):
        reporter.say("")
    for part in found.parts:
        findings(reporter, part)
    for part in found.parts:
        if part.lengths is not None:
            reporter.say("")
            histogram(reporter, part.name, part.lengths)
    if found.packing is not None:
        reporter.say("")
        reporter.table(
            "What packing saves in a pass",
            ("", "computed", "padding", f"batches of {found.packing.batch_size}"),
            packing_table(found.packing),
        )
        reporter.say(packing_verdict(found.packing, found.is_packed))
    if found.examples:
        reporter.say("")
        reporter.marked([("What is marked like this", True), (" is trained on.", False)])
    for number, shown in enumerate(found.examples, start=1):
        reporter.say("")
        example(reporter, f"example {number} of {len(found.examples)}", shown, is_whole=False)


def first_few(keys: Sequence[str]) -> str:
    """Names of columns, of which there may be many."""
    return ", ".join(keys[:_MOST_KEYS]) + (", …" if len(keys) > _MOST_KEYS else "")


def files_left_out(reporter: Reporter, ledger: Ledger) -> None:
    for source, files in ledger.left_out.items():
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        reporter.warn(f"not read of {visible(source)}: {visible(', '.join(files[:5]))}{more}")


def row_table(parts: Sequence[PartView]) -> list[Row]:
    """Every row in one bucket, a column for each part; then what else became of the kept."""
    ledgers = [part.ledger for part in parts]
    kept = " / ".join(_KEPT[part.name] for part in parts)
    rows = [
        _row("read", ledgers, lambda one: one.num_rows),
        _row(f"  {kept}", ledgers, lambda one: one.num_kept),
    ]
    for word, pick in (("dropped", _dropped), ("set aside", _set_aside)):
        reasons = dict.fromkeys(reason for one in ledgers for reason in pick(one))
        for reason in reasons:
            counts = (f"{pick(one)[reason]:,}" for one in ledgers)
            rows.append((f"  {word}: {visible(reason)}", *counts))
    if any(one.truncated for one in ledgers):
        rows.append(_row("of those kept, truncated", ledgers, lambda one: one.truncated))
    if any(one.split for one in ledgers):
        rows.append(_row("of those kept, split", ledgers, lambda one: one.split))
    return [*rows, _row("sequences made of them", ledgers, lambda one: one.num_sequences)]


def token_table(ledgers: Sequence[Ledger]) -> list[Row]:
    """Every token in one bucket; a line of zeros is left out."""
    counts: tuple[tuple[str, Callable[[Ledger], int]], ...] = (
        ("rendered", lambda one: one.rendered_tokens),
        ("repeated where a row was split", lambda one: one.repeated_tokens),
        ("  supervised (the model learns to write them)", lambda one: one.supervised_tokens),
        ("  context (it only reads them)", lambda one: one.context_tokens),
        ("  cut off kept rows", lambda one: one.cut_tokens),
        ("  in dropped rows", lambda one: one.dropped_tokens),
    )
    always = ("rendered", "  supervised (the model learns to write them)")
    return [
        _row(name, ledgers, pick)
        for name, pick in counts
        if name in always or any(pick(one) for one in ledgers)
    ]


def findings(reporter: Reporter, part: PartView) -> None:
    for finding in part.ledger.findings():
        reporter.warn(f"{part.name}: {visible(finding)}")


def histogram(reporter: Reporter, name: str, lengths: Lengths) -> None:
    """Bars, with max_length where it stands among them."""
    reporter.say(
        f"Tokens per row, {name}: half have at most {lengths.p50:,}, 90% {lengths.p90:,}, "
        f"99% {lengths.p99:,}; the longest has {lengths.longest:,}"
    )
    most = max(one.count for one in lengths.bins)
    ranges = [range_of(one) for one in lengths.bins]
    width = max(map(len, ranges))
    counts = max(len(f"{one.count:,}") for one in lengths.bins)
    is_marked = False
    for label, one in zip(ranges, lengths.bins, strict=True):
        if one.first > lengths.max_length and not is_marked:
            is_marked = True
            reporter.say(f"  {'':{width}} ├── {limit(lengths)}")
        drawn = bar(one.count / most)
        reporter.say(f"  {label:>{width}} │{drawn:{_BAR_WIDTH}} {one.count:>{counts},}")
    if not is_marked:
        reporter.say(f"  {'':{width}} ├── {limit(lengths)}")


def range_of(one: LengthBin) -> str:
    return f"{one.first:,}–{one.last:,}" if one.first < one.last else f"{one.first:,}"


def limit(lengths: Lengths) -> str:
    """What max_length means for these rows."""
    longer = f"{_num(lengths.num_longer, 'row')} longer" if lengths.num_longer else "no row longer"
    return f"max_length {lengths.max_length:,}: {longer}"


def _num(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def bar(share: float) -> str:
    """A bar in eighths of a character; what is not nothing can be seen."""
    eighths = max(round(share * _BAR_WIDTH * 8), 1) if share else 0
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest - 1] if rest else "")


def packing_table(packing: Packing) -> list[Row]:
    """Padded batches against packed ones."""
    ways = (
        ("padded to the longest of each batch", packing.padded_tokens, packing.num_batches),
        (
            f"packed into {_num(packing.num_packed, 'sequence')}",
            packing.packed_tokens,
            packing.num_packed_batches,
        ),
    )
    return [
        (name, f"{tokens:,}", f"{1 - packing.num_tokens / tokens:.0%}", f"{batches:,}")
        for name, tokens, batches in ways
    ]


def packing_verdict(packing: Packing, is_packed: bool) -> str:
    """What it saves, and what to do about it."""
    share = packing.share_saved
    saves = f"computes {share:.0%} fewer tokens" if share >= 0.005 else "saves nothing here"
    if is_packed:
        return f"Packing is on, and {saves}."
    if share < 0.005:
        return f"Packing {saves}."
    return (
        f"Packing {saves} (data.packing=true); as a pass is then fewer batches, train for "
        "more of them or with smaller ones."
    )


def example(reporter: Reporter, title: str, shown: Shown, is_whole: bool) -> None:
    """One sequence, with what is trained on marked."""
    reporter.say(
        f"{title}: {visible(shown.origin)}, {shown.num_tokens:,} tokens, "
        f"{shown.num_supervised:,} of them supervised"
    )
    for note in shown.notes:
        reporter.say(f"  note: {visible(note)}")
    marked = [
        (text if is_whole else shortened(text), supervised)
        for text, supervised in runs(shown.pieces)
    ]
    reporter.marked([(visible(text), supervised) for text, supervised in marked])


def fate(reporter: Reporter, found: Fate) -> None:
    """What became of one row, in full."""
    reporter.say(f"{found.part}: {visible(found.origin)} is {visible(found.outcome)}")
    for note in found.notes:
        reporter.say(f"  note: {visible(note)}")
    if not found.sequences and found.record:
        reporter.say(f"  as read: {visible(shortened(found.record, _MOST_OF_A_RECORD))}")
    for number, shown in enumerate(found.sequences, start=1):
        example(reporter, f"sequence {number} of {len(found.sequences)}", shown, is_whole=True)


def _row(name: str, ledgers: Sequence[Ledger], pick: Callable[[Ledger], int]) -> Row:
    return (name, *(f"{pick(one):,}" for one in ledgers))


def _dropped(ledger: Ledger) -> Counter[str]:
    return ledger.dropped


def _set_aside(ledger: Ledger) -> Counter[str]:
    return ledger.set_aside
