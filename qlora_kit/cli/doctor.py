"""`qlora-kit doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

import json

import typer

from qlora_kit.cli.arguments import AsJson

NAME = "doctor"

_MARKS = {"ok": "ok", "note": "note", "missing": "missing", "broken": "BROKEN"}


def command(as_json: AsJson = False) -> None:
    """Say what this machine can do, what is missing, and what that means for a recipe."""
    from qlora_kit.doctor import diagnose
    from qlora_kit.environment import thread_setting

    diagnosis = diagnose(thread_setting())
    if as_json:
        print(json.dumps(diagnosis.as_dict(), indent=2, ensure_ascii=False))
        raise typer.Exit(1 if diagnosis.broken else 0)
    width = max(len(finding.name) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        mark = _MARKS[finding.status]
        print(f"{mark:8} {finding.name:{width}}  {finding.found}")
        if finding.means:
            print(f"{'':8} {'':{width}}  → {finding.means}")
    print()
    if diagnosis.broken:
        names = ", ".join(finding.name for finding in diagnosis.broken)
        print(f"Broken: {names}. Nothing trains as the default recipe has it until mended.")
        raise typer.Exit(1)
    print("Everything that is needed works.")
