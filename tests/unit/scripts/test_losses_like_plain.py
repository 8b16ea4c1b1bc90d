"""50 updates by the kit, with all that it does otherwise, against plain transformers + peft.

Both by the sides of bench_train, with SGD: AdamW hides a gradient that is wrong by a constant.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import bench_train
import pytest
from train_bench import table
from train_bench.sides import kit, plain
from train_bench.work import prepared

UPDATES = 50


def trained(folder: Path, *options: str) -> tuple[table.Apart, list[float], str]:
    """(how far the losses of the kit are from plain's, plain's, what the kit said)"""
    arguments = bench_train.parsed(["--updates", str(UPDATES), *options])
    work, _ = prepared(arguments, folder)
    wanted = plain.train(work, folder).losses
    found = kit.train(work, folder).losses
    assert len(wanted) == UPDATES
    return table.difference(found, wanted), wanted, (folder / "run" / "output.log").read_text()


def write_rows(path: Path, num_rows: int) -> Path:
    """Of mixed length."""
    drawn = random.Random(0)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "turn the lamp " * drawn.randint(1, 6)},
                {"role": "assistant", "content": "to 30 percent " * drawn.randint(1, 8)},
            ]
        }
        for _ in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_losses_of_50_updates(
    tmp_path: Path, loud_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pass
