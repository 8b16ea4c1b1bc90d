"""Arguments that several verbs share, and how they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as YAML.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE …", help="Overrides, such as train.max_steps=10."),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE …", help="The method's options, as block_size=32."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Figures as JSON on standard output.")]
SubjectName = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, an adapter's, or a model.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that ships with the model.")
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read .bin/.pt weights, which can run code when loaded."),
]
AdapterPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, or an adapter's.")
]
MergeDtype = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"] | None,
    typer.Option(help="What a merge is rounded to, once; auto: the base's own."),
]
HeldOutRows = Annotated[
    Path | None, typer.Option(help="Held-out rows to measure on, instead of the run's own.")
]
Text = Annotated[
    Path | None, typer.Option(help="A plain text to measure on instead of a recipe's eval rows.")
]
Window = Annotated[int, typer.Option(min=8, help="Tokens of the sliding window over --text.")]
Force = Annotated[
    bool, typer.Option("--force", help="Load an adapter onto another base than its own.")
]
CalibrationTokens = Annotated[
    int | None, typer.Option(min=2, help="How much of it; unset: up to 16384 tokens.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seeds what is drawn.")]


def given_options(context: typer.Context) -> frozenset[str]:
    """Parameters that are named on the command line, whatever they are set to."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(
        name for name, source in sources.items() if source and source.name == "COMMANDLINE"
    )


def refuse_unused(given: frozenset[str], names: Iterable[str], why: str) -> None:
    """
    Raises:
        BadParameter: some of `names` are given, and would do nothing.
    """
    flags = [f"--{name.replace('_', '-')}" for name in names if name in given]
    if flags:
        listed = ", ".join(flags[:-1]) + " and " if flags[1:] else ""
        have, them = ("have", "them") if flags[1:] else ("has", "it")
        raise typer.BadParameter(f"{listed}{flags[-1]} {have} no effect {why}; leave {them} out.")


def budget_of_kl(value: float | None) -> float | None:
    """What --max-kl may be, as a callback; Typer's own bounds let NaN pass.

    Raises:
        BadParameter: it is negative, or not finite.
    """
    if value is not None and not 0 <= value < math.inf:
        raise typer.BadParameter(f"must be nats per token, from 0 on, such as 0.05; got {value:g}.")
    return value


def budget_above_zero(value: float | None) -> float | None:
    """The same where a recipe has that budget too, and takes no 0."""
    if value == 0:
        raise typer.BadParameter(f"must be above 0 nats per token, such as 0.001; got {value:g}.")
    return budget_of_kl(value)


def parse_bytes(text: str) -> int:
    """What --budget says, in bytes: `5.0GiB`, `600 MB`.

    Raises:
        BadParameter: it is no size.
    """
    from qlora_kit.recipe.size import size_bytes

    found = size_bytes(text)
    if found is None:
        raise typer.BadParameter(f"--budget must be a size such as 5.0GiB or 600MB, got {text}.")
    return found
