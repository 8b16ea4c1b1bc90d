"""One side's run, by its interpreter: `python -m train_bench.child SIDE RECOMPUTE FOLDER`."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from train_bench.registry import SIDES
from train_bench.told import device_peaks, versions
from train_bench.work import Work


def main(side: str, recompute: str, folder: Path) -> None:
    """Do the work as the side does it, and write down what it tells."""
    if side == "kit":
        from qlora_kit.__main__ import begin

        begin()
    work = replace(Work(**json.loads((folder / "work.json").read_text())), recompute=recompute)
    told = importlib.import_module(SIDES[side].module).train(work, folder)
    (folder / "told.json").write_text(
        json.dumps({**asdict(told), "versions": versions(), "device": device_peaks()})
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
