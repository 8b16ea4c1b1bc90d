"""Options of `qlora-kit evaluate`; most of them are for the tasks of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeOfRows = Annotated[
    Path | None,
    typer.Option(help="The recipe whose data and evaluate sections are used; a run has its own."),
]
Speed = Annotated[
    bool,
    typer.Option("--speed", help="Size, peak memory, time to load and tokens per second as well."),
]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="TASK,…", help="Ask these tasks of lm-eval instead of eval rows."),
]
IncludePath = Annotated[Path | None, typer.Option(help="Folder with YAML files of your own tasks.")]
NumFewshot = Annotated[
    int | None, typer.Option(min=0, help="Examples before each question of a task.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Ask only the first rows of each task.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask tasks through the chat template.")]
