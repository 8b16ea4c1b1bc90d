"""Options of `qlora-kit sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_kit.cli.arguments import budget_of_kl

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model in 16 or 32 bits: folder or hub id.")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Rows to measure on: a recipe (its data.train), a text file, any file of rows, "
        "or demo/commands.",
    ),
]
Cheap = Annotated[
    bool, typer.Option("--cheap", help="Estimate all layers in one pass of activations.")
]
Check = Annotated[
    int, typer.Option(min=0, help="With --cheap: measure this many, and compare the order.")
]
By = Annotated[Literal["layer", "kind", "block"], typer.Option(help="What is quantized together.")]
Method = Annotated[
    Literal["nf4", "fp4", "int4", "int8"], typer.Option(help="What it is quantized to.")
]
BlockSize = Annotated[int, typer.Option(help="Numbers that share a scale.")]
DoubleQuant = Annotated[bool, typer.Option(help="Quantize the scales of nf4 and fp4 too.")]
NumTokens = Annotated[int, typer.Option(min=2, help="Tokens to measure on.")]
WindowTokens = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Tokens of a row at most. Unset: 256, or the model's context where that is shorter.",
    ),
]
Stability = Annotated[
    bool, typer.Option("--stability", help="Rank on other rows too, and compare the order.")
]
Budget = Annotated[
    str | None,
    typer.Option(help="Choose bits per layer within this memory: 5.0GiB, 600MB."),
]
MaxKl = Annotated[
    float | None,
    typer.Option(callback=budget_of_kl, help="Choose the smallest mixture within this KL."),
]
Progressive = Annotated[
    bool,
    typer.Option(
        "--progressive", help="With --max-kl: 16 → 8 → 4 bits in steps, as far as it holds."
    ),
]
Steps = Annotated[
    int, typer.Option(min=1, help="Steps from one width to the next, with --progressive.")
]
Statistics = Annotated[
    bool, typer.Option("--statistics", help="Weights alone: nothing is run, NaN are counted.")
]
Top = Annotated[int, typer.Option(min=1, help="Rows of the tables.")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder to make, with sensitivity.json, heat-map.png and recipe.yaml; with "
        "--statistics, with statistics.json."
    ),
]
