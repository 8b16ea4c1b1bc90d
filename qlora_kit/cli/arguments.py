"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as YAML.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE …", help="Overrides, such as train.max_steps=10."),
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
Force = Annotated[
    bool, typer.Option("--force", help="Load an adapter onto another base than its own.")
]
