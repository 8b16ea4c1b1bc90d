"""50 updates by the kit, with all that it computes otherwise, against plain transformers + peft.

Both as bench_train's sides have them, in float32 on rows of mixed length, and with SGD too: AdamW
takes no notice of a gradient that is wrong by a constant factor.
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
SHORTCUTS = (
    "logits at supervised places alone",
    "LoRA layers in",
    "MLPs that keep less",
    "norms that keep less",
    "without padding",
)


def trained(folder: Path, model: str, *options: str) -> tuple[list[float], list[float]]:
    """The losses of the kit, and those of plain, update by update."""
    rows = write_rows(folder / "rows.jsonl", num_rows=24)
    work = ("--batch", "3", "--accumulation", "2", "--updates", str(UPDATES))
    given = ("--model", model, "--rows", str(rows), "--max-length", "256", *work, *options)
    done, _ = prepared(bench_train.parsed(given), folder)
    return kit.train(done, folder).losses, plain.train(done, folder).losses


def write_rows(path: Path, num_rows: int) -> Path:
    """Of mixed length."""
    drawn = random.Random(0)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"lamp {n}: " + "please " * drawn.randint(1, 5)},
                {"role": "assistant", "content": "to 30 percent " * drawn.randint(1, 6)},
            ]
        }
        for n in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "options", [(), ("--optimizer", "sgd", "--learning-rate", "0.1")], ids=["adamw", "sgd"]
)
def test_losses_of_50_updates(
    tmp_path: Path, loud_llama: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten times nearer than the benches ask for."""
    found, wanted = trained(tmp_path, str(loud_llama), *options)
    said = capsys.readouterr().out
    assert all(shortcut in said for shortcut in SHORTCUTS), said
    assert wanted[-1] < 0.9 * wanted[0], "something has to be learned"
    assert len(found) == UPDATES
    assert table.difference(found, wanted).relative < 1e-5


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.timeout(3600)
def test_losses_of_50_updates_of_the_demo_model(tmp_path: Path) -> None:
    found, wanted = trained(tmp_path, "demo/smollm2-135m-instruct")
    assert wanted[-1] < 0.5 * wanted[0], "something has to be learned"
    assert len(found) == UPDATES
    assert table.difference(found, wanted).relative < 1e-4
