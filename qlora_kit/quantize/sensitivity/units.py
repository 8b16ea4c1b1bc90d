"""What is quantized together: a layer, all of one kind, or a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

By = Literal["layer", "kind", "block"]

NO_BLOCK = "–"


@dataclass(frozen=True)
class Unit:
    """Linear modules that are replaced at the same time, under one name."""

    name: str
    modules: tuple[str, ...]


def units_of(modules: Sequence[str], by: By) -> tuple[Unit, ...]:
    """The units of a model, in the order in which its modules stand."""
    keys: dict[By, Callable[[str], str]] = {
        "layer": lambda module: module,
        "kind": kind_of,
        "block": block_of,
    }
    key = keys[by]
    grouped: dict[str, list[str]] = {}
    for module in modules:
        grouped.setdefault(key(module), []).append(module)
    return tuple(Unit(name, tuple(members)) for name, members in grouped.items())


def kind_of(module: str) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj`: what stands behind the block."""
    parts = module.split(".")
    number = _number(parts)
    return module if number is None else ".".join(parts[number + 1 :])


def block_of(module: str) -> str:
    """`model.layers.3` of `model.layers.3.self_attn.q_proj`; a dash outside of blocks."""
    parts = module.split(".")
    number = _number(parts)
    return NO_BLOCK if number is None else ".".join(parts[: number + 1])


def _number(parts: Sequence[str]) -> int | None:
    """Where in a name the number of the block stands."""
    return next((place for place, part in enumerate(parts) if part.isdigit()), None)
