"""The shapes that are measured, one thing varied at a time, and those that are told of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from plan_bench.cases import Case, case

TOKENIZER_ENTRIES = 8192
BASE = case(
    "base", "llama", 576, 1536, 4, 9, 3, TOKENIZER_ENTRIES, 512, 1, 16,
    train={"gradient_checkpointing": False, "optim": "adamw_torch"},
)  # fmt: skip


def _width(hidden: int) -> Case:
    heads = hidden // 64
    return replace(BASE, hidden=hidden, inner=hidden * 8 // 3, heads=heads, kv_heads=heads // 3)


SWEEPS: dict[str, Sequence[Case]] = {
    "length": [replace(BASE, tokens=n) for n in (256, 512, 1024, 2048, 4096, 8192)],
    "layers": [replace(BASE, layers=n) for n in (2, 4, 8, 16)],
    "width": [_width(n) for n in (192, 384, 576, 1152, 1728)],
    "rank": [replace(BASE, rank=n) for n in (4, 16, 64, 256)],
    "vocabulary": [replace(BASE, vocabulary=n) for n in (8192, 32768, 131072)],
    "batch": [replace(BASE, batch=n, tokens=256) for n in (1, 2, 4, 8)],
    "recompute": [replace(BASE, train={**BASE.train, "gradient_checkpointing": True})],
}
DEMO = replace(BASE, name="SmolLM2-135M, 2 x 256", layers=30, vocabulary=49152, tokens=256, batch=2)
_8B = ("llama", 4096, 14336, 32, 32, 8, 128256)
_70B = ("llama", 8192, 28672, 80, 64, 8, 128256)
_ALL = {"gradient_checkpointing": True}
LARGE = {
    one.name: one
    for one in (
        DEMO,
        case("8B, 2,048, no recompute", *_8B, 2048, 1, 16, train=BASE.train),
        case("8B, 2,048", *_8B, 2048, 1, 16, train=_ALL),
        case("8B, 8,192", *_8B, 8192, 1, 16, train=_ALL),
        case("70B, 2,048", *_70B, 2048, 1, 16, train=_ALL),
    )
}
"""Whose time is extrapolated; all layers recompute but where it says otherwise."""
ROW_COUNTS = (64, 1024, 16384)


def rows_of(sweep: str, shapes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [one for one in shapes if sweep in one["sweeps"]]
    return sorted(found, key=lambda one: quantity_of(sweep, one["case"]))


def quantity_of(sweep: str, one: dict[str, Any]) -> int:
    """What a sweep varies, of one of its shapes."""
    return int(
        one[{"length": "tokens", "width": "hidden", "recompute": "layers"}.get(sweep, sweep)]
    )


def value_of(sweep: str, one: dict[str, Any]) -> str:
    return "all layers" if sweep == "recompute" else f"{quantity_of(sweep, one):,}"
