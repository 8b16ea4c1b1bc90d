"""When so many rows are lost that a run must not start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.data.fit import NOTHING_LEFT, OVERLENGTH

if TYPE_CHECKING:
    from qlora_kit.data.ledger import Ledger
    from qlora_kit.recipe import DataSpec
    from qlora_kit.recipe.data import PartName


def losses(name: PartName, ledger: Ledger, spec: DataSpec) -> str | None:
    """Why a run with so many rows lost must not start; None where it may."""
    if ledger.num_kept == 0 and name == "eval" and spec.held_out is not None:
        return (
            f"data.held_out is {spec.held_out:g}, and of {ledger.num_rows} rows none is held out; "
            "raise it, or name rows in data.eval."
        )
    if ledger.num_kept == 0:
        return f"data.{name} has nothing to train on: no row was kept."
    num_overlength = ledger.dropped[OVERLENGTH]
    if spec.overlength == "error" and num_overlength:
        origins = ", ".join(ledger.examples[OVERLENGTH])
        return (
            f"data.{name}: {num_overlength} of {ledger.num_rows} rows are longer than "
            f"data.max_length, {spec.max_length} tokens (for example {origins}), and "
            "data.overlength is error. Raise the one, or set the other to drop, split or truncate."
        )
    num_lost = ledger.num_lost - (ledger.truncated if spec.overlength == "truncate" else 0)
    share = num_lost / ledger.num_rows
    if share <= spec.max_dropped_share:
        return None
    by_length = num_overlength + ledger.dropped[NOTHING_LEFT] + ledger.truncated
    longer = f"data.max_length (now {spec.max_length}) or " if by_length else ""
    return (
        f"data.{name}: {num_lost} of {ledger.num_rows} rows ({share:.1%}) would be "
        f"dropped, more than the {spec.max_dropped_share:.1%} allowed. Mend "
        f"them, or raise {longer}data.max_dropped_share."
    )
