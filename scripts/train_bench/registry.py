"""The sides that can be compared, by name: where each is, and what it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    """One side, as it is asked for on the command line."""

    module: str
    """Has `train(work, folder) -> Told`."""
    package: str = ""
    """Distribution that its environment must have; empty: this program's own will do."""
    needs: str = ""
    """Option that says where that environment is: a folder of packages or an interpreter."""
    gpu_only: bool = False

    @property
    def option(self) -> str:
        """As it is written on the command line, without its dashes."""
        return self.needs.replace("_", "-")

    @property
    def has_interpreter(self) -> bool:
        """Whether the option names a Python of another environment."""
        return bool(self.needs) and self.needs != "trl"


SIDES = {
    "kit": Side("train_bench.sides.kit"),
    "plain": Side("train_bench.sides.plain"),
    "trl": Side("train_bench.sides.trl", "trl", "trl"),
    "llama-factory": Side("train_bench.sides.llama_factory", "llamafactory", "llama_factory"),
    "axolotl": Side("train_bench.sides.axolotl", "axolotl", "axolotl"),
    "unsloth": Side("train_bench.sides.unsloth", "unsloth", "unsloth", gpu_only=True),
    "torchtune": Side("train_bench.sides.torchtune", "torchtune", "torchtune"),
}


@dataclass(frozen=True)
class Turn:
    """One side with one setting of recomputation, a line of the table."""

    side: str
    recompute: str
    """`auto` leaves the choice to the side: its own default."""
    label: str


def turns(sides: Sequence[str], recompute: str) -> list[Turn]:
    """What is run in a round. Plain transformers + peft has no choice of its own: where every side
    is left to its default, plain is run both without recomputing and with all of it.
    """
    found = []
    for side in sides:
        if side == "plain" and recompute == "auto":
            found += [Turn(side, one, f"plain {one}") for one in ("none", "all")]
        else:
            found.append(Turn(side, recompute, side))
    return found
