"""A preview of the data as one HTML page that needs nothing else: no script, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from qlora_kit.data.pieces import Piece, Shown
from qlora_kit.data.preview import Lengths, Preview
from qlora_kit.report.data_text import (
    first_few,
    limit,
    packing_table,
    packing_verdict,
    range_of,
    row_table,
    token_table,
)
from qlora_kit.report.visible import LINE_BREAK, visible

_STYLE = """
:root { color-scheme: light dark; --text: #1d2128; --faint: #6b7280; --line: #d9dde3;
  --page: #fbfbfc; --card: #ffffff; --bar: #7c9cc4; --mark: #c2410c;
  --learned: #c9efd2; --learned-text: #0b4a1f; --special: #7c3aed; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ec; --faint: #98a1ae;
  --line: #343a44; --page: #15181d; --card: #1c2026; --bar: #5b7ea8; --mark: #fb923c;
  --learned: #17482a; --learned-text: #c5f3d2; --special: #c4a7ff; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  margin: 0 auto; max-width: 62rem; padding: 1.5rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem 1.2rem .15rem 0; text-align: right; white-space: pre-wrap;
  overflow-wrap: anywhere; }
th { font-weight: 600; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.faint { color: var(--faint); } .fault { border-left: 4px solid var(--mark); padding-left: 1rem; }
.example { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .8rem 1rem; margin: .5rem 0 1.2rem; overflow-wrap: anywhere; white-space: pre-wrap;
  font: 14px/1.7 ui-monospace, monospace; }
.learned { background: var(--learned); color: var(--learned-text); }
.special { color: var(--special); font-weight: 600; }
.example span:hover { outline: 1.5px solid var(--mark); border-radius: 2px; }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--text); } svg .bar { fill: var(--bar); } svg .beyond { fill: var(--mark); }
svg .limit { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 4 3; }
svg .limit-text { fill: var(--mark); }
"""

# Nothing is loaded and nothing runs, whatever a row of the data says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_ROW_HEIGHT = 20
_LABELS_WIDTH = 150
_BARS_WIDTH = 560


def page(found: Preview) -> str:
    """The whole preview."""
    names = [part.name for part in found.parts]
    ledgers = [part.ledger for part in found.parts]
    parts = [
        f"<h1>{_text(found.title)}</h1>",
        *(f'<p class="fault">{_text(fault)}</p>' for fault in found.faults),
        "<h2>Sources</h2>",
        *_schemas(found),
        "<h2>Where every row went</h2>",
        _table(("", *names), row_table(found.parts)),
        "<h2>Where every token went</h2>",
        _table(("", *names), token_table(ledgers)),
        *_findings(found),
    ]
    for part in found.parts:
        if part.lengths is not None:
            parts += [f"<h2>Tokens per row, {part.name}</h2>", *_histogram(part.lengths)]
    if found.packing is not None:
        columns = ("", "computed", "padding", f"batches of {found.packing.batch_size}")
        parts += [
            "<h2>What packing saves in a pass</h2>",
            _table(columns, packing_table(found.packing)),
            f"<p>{_text(packing_verdict(found.packing, found.is_packed))}</p>",
        ]
    parts += _examples(found.examples)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(found.title)}: the data</title>\n<style>{_STYLE}</style>\n</head>\n"
        "<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _not_read(keys: Sequence[str] | None) -> str:
    return f"; not read: {first_few(keys)}" if keys else ""


def _schemas(found: Preview) -> list[str]:
    rows = [
        (part.name, visible(source), visible(schema + _not_read(part.ledger.ignored.get(source))))
        for part in found.parts
        for source, schema in part.ledger.schemas.items()
    ]
    items = (
        f"<li>{name}: <b>{escape(source)}</b> – {escape(schema)}</li>"
        for name, source, schema in rows
    )
    return ["<ul>", *items, "</ul>"]


def _findings(found: Preview) -> list[str]:
    lines = [
        f"<li>{part.name}: {_text(finding)}</li>"
        for part in found.parts
        for finding in part.ledger.findings()
    ]
    return ["<h2>Findings</h2>", "<ul>", *lines, "</ul>"] if lines else []


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(one)}</th>" for one in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"


def _histogram(lengths: Lengths) -> list[str]:
    """One bar under the other, so that labels have room; max_length is a line between two."""
    most = max(one.count for one in lengths.bins)
    drawn = []
    top, limit_at = 4, None
    for one in lengths.bins:
        if one.first > lengths.max_length and limit_at is None:
            limit_at = top
            top += _ROW_HEIGHT
        kind = "bar" if limit_at is None else "bar beyond"
        width = max(one.count / most * _BARS_WIDTH, 1.0) if one.count else 0
        middle = top + _ROW_HEIGHT * 0.7
        drawn.append(
            f'<text x="{_LABELS_WIDTH - 8}" y="{middle:g}" text-anchor="end">'
            f"{range_of(one)}</text>"
            f'<rect class="{kind}" x="{_LABELS_WIDTH}" y="{top + 2}" width="{width:.1f}" '
            f'height="{_ROW_HEIGHT - 4}"></rect>'
            f'<text x="{_LABELS_WIDTH + width + 6:.1f}" y="{middle:g}">{one.count:,}</text>'
        )
        top += _ROW_HEIGHT
    if limit_at is None:
        limit_at = top
        top += _ROW_HEIGHT
    right = _LABELS_WIDTH + _BARS_WIDTH
    middle = limit_at + _ROW_HEIGHT / 2
    drawn.append(
        f'<line class="limit" x1="{_LABELS_WIDTH}" x2="{right}" y1="{middle:g}" '
        f'y2="{middle:g}"></line><text class="limit-text" x="{right + 6}" y="{middle + 4:g}">'
        f"{limit(lengths)}</text>"
    )
    full = right + 240
    return [
        f"<p>Half have at most {lengths.p50:,}, 90% {lengths.p90:,}, 99% {lengths.p99:,}; the "
        f"longest has {lengths.longest:,}.</p>",
        f'<svg role="img" aria-label="histogram of tokens per row" viewBox="0 0 {full} {top + 4}" '
        f'width="{full}" height="{top + 4}">',
        *drawn,
        "</svg>",
    ]


def _examples(examples: Sequence[Shown]) -> list[str]:
    if not examples:
        return []
    parts = [
        "<h2>Examples</h2>",
        '<p>What is <span class="learned">marked like this</span> is trained on; the rest is '
        'context. <span class="special">Special tokens</span> stand in the text as the model '
        "gets them. Point at a token to see where it ends, and its number.</p>",
    ]
    for shown in examples:
        notes = "".join(f"<br>{_text(note)}" for note in shown.notes)
        pieces = "".join(_piece(piece) for piece in shown.pieces)
        parts += [
            f'<p class="faint">{_text(shown.origin)}: {shown.num_tokens:,} tokens, '
            f"{shown.num_supervised:,} of them supervised{notes}</p>",
            f'<div class="example">{pieces}</div>',
        ]
    return parts


def _piece(piece: Piece) -> str:
    kinds = [
        name
        for name, applies in (("learned", piece.is_supervised), ("special", piece.is_special))
        if applies
    ]
    style = f' class="{" ".join(kinds)}"' if kinds else ""
    numbers = " ".join(map(str, piece.ids))
    text = _text(piece.text).replace(LINE_BREAK, f"{LINE_BREAK}\n")
    return f'<span{style} title="{numbers}">{text}</span>'


def _text(text: str) -> str:
    return escape(visible(text))
