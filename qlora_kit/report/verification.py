"""What `verify` found, in lines."""

from __future__ import annotations

from qlora_kit.artifact.lineage import Link
from qlora_kit.artifact.verify import Verification
from qlora_kit.report.reporter import Reporter


def show_verification(reporter: Reporter, verification: Verification) -> None:
    """One line for each thing that was looked at, its faults below; what it was made from is
    indented.
    """
    for link in verification.links:
        indent = "" if link.role == "itself" else "  from "
        reporter.say(f"{indent}{link.kind} {link.name}: {_verdict(link)}")
        for fault in link.faults:
            reporter.say(f"{' ' * len(indent)}  - {fault}")
    num_faults = sum(len(link.faults) for link in verification.links)
    if num_faults:
        reporter.warn(f"{num_faults} finding{'s' if num_faults > 1 else ''}.")
    else:
        reporter.say("Everything is as it was written.")


def _verdict(link: Link) -> str:
    if link.faults:
        return "NOT as it was"
    if link.unchecked:
        return f"not checked: {link.unchecked}"
    if link.role != "itself":
        return "the same"
    return "whole" if link.num_files is None else f"whole ({link.num_files} files)"
