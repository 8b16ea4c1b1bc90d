"""`qlora-kit verify DIR`: is it still what was made, from what it says it was made from?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora_kit.cli.arguments import AllowPickle, AsJson

NAME = "verify"


def command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run, an export, an adapter or a checkpoint.")
    ],
    lineage: Annotated[
        bool,
        typer.Option(
            "--lineage/--no-lineage", help="Also check what it was made from, back to the base."
        ),
    ] = True,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Re-check every file of a folder, and everything that it was made from."""
    from qlora_kit.artifact.verify import verify

    verification = verify(folder.expanduser(), allow_pickle, lineage)
    if as_json:
        print(json.dumps(verification.as_dict(), indent=2, ensure_ascii=False))
    else:
        from qlora_kit.cli.console import console_reporter
        from qlora_kit.report.verification import show_verification

        show_verification(console_reporter(), verification)
    raise typer.Exit(0 if verification.holds else 1)
