"""Arguments that several verbs share, and how they are read."""

from __future__ import annotations

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
