"""Two processes, each with a random state of its own, gone on with to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path

from together import Job, Together

from qlora_kit.checkpoint.checkpoints import find_checkpoints
from qlora_kit.records import file_sha256

from .conftest import write_recipe


def test_dropout_and_noise_of_each_process_go_on(
    tmp_path: Path, tiny_llama: Path, two: Together
) -> None:
    """The folder is as a kill after the second update's checkpoint leaves it, log included."""
    recipe = write_recipe(
        tmp_path,
        tiny_llama,
        train={
            "learning_rate": 1e-2,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "neftune_noise_alpha": 5.0,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": None,
        },
        lora={"r": 8, "alpha": 16, "dropout": 0.2},
        evaluate={"perplexity": False},
        export={"merge": False},
    )
    whole, killed = tmp_path / "run", tmp_path / "killed"
    assert two.train(tmp_path, [Job(str(recipe))]) == [["", ""]]
    shutil.copytree(whole, killed)
    (killed / "summary.json").unlink()
    shutil.rmtree(killed / "adapter")
    for checkpoint in find_checkpoints(killed)[:-1]:
        shutil.rmtree(checkpoint)
    assert [one.name for one in find_checkpoints(killed)] == ["checkpoint-2"]
    assert two.train(tmp_path, [Job(str(recipe), (f"run_dir={killed}",))]) == [["", ""]]
    name = Path("adapter") / "adapter_model.safetensors"
    assert file_sha256(killed / name) == file_sha256(whole / name)
