"""Options of `qlora-kit quantize`; two of them answer by themselves, and nothing is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_kit.cli.arguments import budget_of_kl
from qlora_kit.quantize.methods import METHODS


def _show_methods(wanted: bool) -> None:
    """Every method with its summary."""
    if not wanted:
        return
    for name, entry in METHODS.items():
        print(f"{name:9} {entry.summary}")
    print("--describe METHOD tells a method's options.")
    raise typer.Exit


def _describe(name: str | None) -> None:
    """The options of one method."""
    if name is None:
        return
    from qlora_kit.quantize.methods import any_of, entry_of
    from qlora_kit.quantize.options import describe_options

    method = any_of(name)
    print(f"{name}: {entry_of(method.name).summary}")
    for option, default, meaning in describe_options(method.options):
        print(f"\n{option}={default}\n    {meaning}")
    if not method.options.model_fields:
        print("\nIt has no options.")
    raise typer.Exit


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RUN", help="A model in 16 or 32 bits; of a run, its 16-bit merge."
    ),
]
Method = Annotated[str, typer.Option(help="nf4, fp4, llm-int8, int8, gptq, awq, gguf:TYPE, onnx …")]
Out = Annotated[Path, typer.Option(help="Folder to make.")]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text to calibrate on: a recipe, a file, wikitext2, c4, a hub data set."),
]
CalibrationLength = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Tokens that are read at once; longer rows are cut. Unset: 512, or the model's "
        "context where that is shorter.",
    ),
]
Sampling = Annotated[
    Literal["whole", "random", "by-source", "by-length"],
    typer.Option(help="From the start, at random, or evenly over sources or lengths."),
]
Data = Annotated[
    str | None,
    typer.Option(help="Held-out text to compare on: a recipe (its eval rows), a file …"),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of it that are compared, at most.")]
MaxKl = Annotated[
    float | None,
    typer.Option(
        callback=budget_of_kl,
        help="Budget: mean KL in nats per token from the source; exit 1 above it.",
    ),
]
Methods = Annotated[
    bool,
    typer.Option("--methods", help="List the methods.", is_eager=True, callback=_show_methods),
]
Describe = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD", help="Tell a method's options.", is_eager=True, callback=_describe
    ),
]
