"""Options of `qlora-kit compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="A B [C …]",
        help="Runs, adapters, model folders, GGUF files, ONNX folders or hub ids; the others "
        "are compared with the first.",
    ),
]
RecipeOfRows = Annotated[
    Path | None,
    typer.Option(help="Whose eval rows and metrics are used; else those of the first run."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe."),
]
MaxTokens = Annotated[
    int, typer.Option(min=1, help="Compare predictions at so many tokens at most.")
]
PromptTokens = Annotated[int, typer.Option(min=1, help="Prompt that reading speed is timed with.")]
NewTokens = Annotated[int, typer.Option(min=2, help="Answer that writing speed is timed with.")]
Repetitions = Annotated[
    int, typer.Option(min=0, help="How often to time each; 0 leaves speed out.")
]
Plot = Annotated[Path | None, typer.Option(help="Picture to write: .png, .svg or .pdf.")]
