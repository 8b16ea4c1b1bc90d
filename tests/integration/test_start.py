"""From the command to the first update: what it is made of, and that a second start is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_kit.records import file_sha256
from qlora_kit.startup import STARTUP_FILE

from .conftest import Call, write_recipe

LEAN = {"evaluate": {"perplexity": False}, "export": {"merge": False}}


def test_the_items_add_up_to_the_whole(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, **LEAN)
    command = (sys.executable, "-m", "qlora_kit", "train", str(recipe), "--profile-startup")
    started = time.time()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "run" / STARTUP_FILE
    whole = path.stat().st_mtime - started
    found = json.loads(path.read_text())
    assert found["seconds"] == pytest.approx(whole, rel=0.03, abs=0.1)
    assert sum(one["seconds"] for one in found["items"]) == pytest.approx(found["seconds"])
    names = [one["name"] for one in found["items"]]
    for name in ("imports", "tokenizer", "load and quantize", "data", "adapter", "first update"):
        assert name in names
        assert name in done.stdout
    assert "from the command to the first update" in done.stdout


@pytest.mark.parametrize(
    "quantization",
    [{}, {"load_in_8bit": True}, {"overrides": {"v_proj": 8}}],
    ids=["nf4", "int8", "mixed"],
)
def test_training_on_a_base_from_the_cache_is_the_same_to_the_bit(
    tmp_path: Path,
    tiny_llama: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    quantization: dict[str, object],
) -> None:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qlora_kit.model.base._WORTH_KEEPING", 1)
    adapters, said = [], []
    for number, gib in enumerate(("0", "1", "1")):
        monkeypatch.setenv("QLORA_KIT_QUANTIZED_GIB", gib)
        folder = tmp_path / str(number)
        recipe = write_recipe(folder, tiny_llama, quantization=quantization, **LEAN)
        done = call("train", recipe, "train.max_steps=3")
        assert done.code == 0, done.out + done.err
        adapters.append(file_sha256(folder / "run" / "adapter" / "adapter_model.safetensors"))
        said.append(next(one for one in done.out.splitlines() if one.startswith("weights ")))
    assert said == [
        "weights   quantized anew",
        "weights   quantized anew and kept for the next start",
        "weights   quantized before: read from the cache, verified",
    ]
    assert len(set(adapters)) == 1
