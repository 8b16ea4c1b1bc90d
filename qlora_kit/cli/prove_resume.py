"""`qlora-kit prove-resume RECIPE`: a killed run against one that was left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora_kit.cli.arguments import AsJson, Overrides, RecipePath

NAME = "prove-resume"


def command(
    recipe: RecipePath,
    overrides: Overrides = None,
    updates: Annotated[
        int, typer.Option("--updates", min=4, help="Updates that each run makes.")
    ] = 6,
    keep: Annotated[
        Path | None, typer.Option("--keep", help="Run in this new folder, and leave it there.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show on this machine that a killed run, gone on with, is the run that was not killed."""
    import tempfile
    from dataclasses import asdict

    from qlora_kit.cli.console import console_reporter
    from qlora_kit.errors import RunError
    from qlora_kit.preflight import load_checked
    from qlora_kit.prove import prove_resume
    from qlora_kit.report.resume import show_proof

    loaded = load_checked(recipe, overrides or ())
    if keep is not None and keep.exists():
        raise RunError(f"--keep {keep} is there already; name a new folder.")
    reporter = console_reporter(to_stderr=as_json)
    if keep is not None:
        proof = prove_resume(loaded, keep.absolute(), updates, reporter)
    else:
        with tempfile.TemporaryDirectory(prefix="prove-resume-") as folder:
            proof = prove_resume(loaded, Path(folder), updates, reporter)
    show_proof(reporter, proof)
    if as_json:
        print(json.dumps({**asdict(proof), "holds": proof.holds}, indent=2))
    raise typer.Exit(0 if proof.holds else 1)
