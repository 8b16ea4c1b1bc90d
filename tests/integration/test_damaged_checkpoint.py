"""From the command line: a byte of a checkpoint that has changed on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qlora_kit.checkpoint.checkpoints import find_checkpoints
from qlora_kit.records import file_sha256

from .conftest import Call, write_recipe


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("count", [1, 2])
def test_is_set_aside_with_a_warning(
    tmp_path: Path, tiny_llama: Path, call: Call, count: int
) -> None:
    """The run goes on from the one before, or from the first update, to the same end."""
    recipe = write_recipe(
        tmp_path,
        tiny_llama,
        train={"learning_rate": 1e-2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2},
        evaluate={"perplexity": False},
        export={"merge": False},
    )
    assert call("train", str(recipe)).code == 0
    folder = tmp_path / "run"
    weights = folder / "adapter" / "adapter_model.safetensors"
    expected = file_sha256(weights)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "adapter")
    for checkpoint in find_checkpoints(folder)[:count]:
        flip(checkpoint / "adapter_model.safetensors")
    said = call("train", str(recipe))
    assert said.code == 0, said.err
    told = " ".join((said.out + said.err).split())
    for step in (4, 2)[:count]:
        assert f"checkpoint-{step} is damaged (" in told
        assert f"is set aside as checkpoint-{step}.damaged." in told
        assert (folder / f"checkpoint-{step}.damaged").is_dir()
    begins_anew = "holds no whole checkpoint: training begins at the first update" in told
    assert begins_anew == (count == 2)
    assert ("checkpoint-2 is whole; training goes on from there" in told) == (count == 1)
    assert file_sha256(weights) == expected
