"""What only a GPU can show: run with `pytest -m gpu`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"say {n}"},
            {"role": "assistant", "content": f"{n}"},
        ]
    }
    for n in range(64)
]


def recipe(folder: Path, **sections: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[:48]))
    (folder / "held.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[48:]))
    model = build_llama(folder / "model", hidden_size=256, intermediate_size=512)
    values = {
        "model": {"name_or_path": str(model)},
        "data": {
            "train": [{"path": str(folder / "rows.jsonl")}],
            "eval": [{"path": str(folder / "held.jsonl")}],
        },
        "train": {"max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1},
        "export": {"merge": True, "merge_options": {"base": "dequantized", "dtype": "float32"}},
        "run_dir": str(folder / "run"),
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values))
    return path


def train(path: Path, *overrides: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_kit", "train", str(path), "--json", *overrides],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error::FutureWarning"},
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(8, 8, 64), (8, 2, 128), (4, 1, 256)])
def test_torch_s_flash_attention_takes_the_examples_of_a_row(
    dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    from qlora_kit.model import variable_length

    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernel needs compute capability 8.0")
    assert variable_length.is_sound(torch.device("cuda", 0), dtype, *heads)
    assert variable_length.failures() == ()


def test_liger_s_kernels_are_exact_here(tmp_path: Path) -> None:
    """Whether or not they are faster."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qlora_kit.model.fused.liger import OPERATIONS
    from qlora_kit.recipe import TrainSpec
    from qlora_kit.train.shortcuts import choose_shortcuts

    folder = build_llama(tmp_path / "model", hidden_size=256, intermediate_size=512)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for wanted in (True, "auto"):
        spec = TrainSpec(use_liger_kernel=wanted)
        found = choose_shortcuts(model, spec, "bf16", is_sharded=False)
        assert found.left == ()
        print(found.why_kernels)
        if wanted is True:
            assert found.liger == OPERATIONS


@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
def test_line_runs_and_merges_within_budget(tmp_path: Path, precision: str) -> None:
    compute = {"auto": "auto", "fp16": "float16", "fp32": "float32"}[precision]
    values = train(
        recipe(tmp_path), f"train.precision={precision}", f"quantization.compute_dtype={compute}"
    )
    training = values["training"]
    assert training["last_loss"] < training["first_loss"]
    divergence = values["certificate"]["divergence"]
    # In 16 bits the trained graph itself rounds; the merged one is measured against that.
    assert divergence["kl_mean"] < (1e-6 if precision == "fp32" else 5e-3)
    assert values["memory"]["device_peak_bytes"]["training"] > 0


def test_eight_bit_base_trains(tmp_path: Path) -> None:
    values = train(recipe(tmp_path), "quantization.load_in_8bit=true", "export.merge=false")
    assert values["training"]["last_loss"] < values["training"]["first_loss"]


def launch(path: Path, *words: str, overrides: tuple[str, ...] = ()) -> dict[str, object]:
    """Under accelerate, with a configuration of ours; what `summary.json` says."""
    folder = Path(__file__).parents[2] / "recipes" / "accelerate"
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    config = ["--config_file", str(folder / words[0]), *words[1:]]
    command = [accelerate, "launch", *config, "-m", "qlora_kit", "train", str(path), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((path.parent / "run" / "summary.json").read_text())


several_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
UNMERGED = ("export.merge=false", "lora.dropout=0", "train.lr_scheduler_type=constant")
HALVED = (*UNMERGED, "train.gradient_accumulation_steps=2")
FULL_PRECISION = ("quantization.compute_dtype=float32", "train.precision=fp32")


@several_gpus
def test_two_gpus_give_the_loss_of_one(tmp_path: Path) -> None:
    alone = train(recipe(tmp_path / "one"), *UNMERGED, *FULL_PRECISION)["training"]
    path = recipe(tmp_path / "two")
    both = launch(path, "ddp.yaml", "--num_processes", "2", overrides=(*HALVED, *FULL_PRECISION))
    assert both["training"]["last_loss"] == pytest.approx(alone["last_loss"], rel=1e-4)
    assert both["training"]["num_tokens"] == alone["num_tokens"]


@several_gpus
def test_fsdp2_gives_the_loss_of_one_gpu(tmp_path: Path) -> None:
    """With everything after training: the adapter saved, the held-out rows evaluated."""
    torch_optimizer = (*UNMERGED, *FULL_PRECISION, "train.optim=adamw_torch")
    alone = train(recipe(tmp_path / "one"), *torch_optimizer)["training"]
    sharded = launch(
        recipe(tmp_path / "two"),
        "fsdp2_qlora.yaml",
        overrides=(
            *HALVED,
            *FULL_PRECISION,
            "train.optim=adamw_torch",
            "quantization.quant_storage=float32",
        ),
    )
    assert sharded["training"]["last_loss"] == pytest.approx(alone["last_loss"], rel=1e-3)
    assert sharded["evaluation"]["tuned"]


@several_gpus
@pytest.mark.parametrize("name", ["deepspeed_zero2.yaml", "deepspeed_zero3.yaml"])
def test_deepspeed_gives_the_loss_of_one_gpu(tmp_path: Path, name: str) -> None:
    """Without checkpoints, which are refused there."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    common = (*UNMERGED, *FULL_PRECISION, "train.optim=adamw_torch", "train.save_strategy='no'")
    alone = train(recipe(tmp_path / "one"), *common)["training"]
    path = recipe(tmp_path / "two")
    halved = (*common, "train.gradient_accumulation_steps=2")
    shared = launch(path, name, overrides=halved)["training"]
    assert shared["last_loss"] == pytest.approx(alone["last_loss"], rel=1e-3)


def test_two_runs_are_the_same_run(tmp_path: Path) -> None:
    from qlora_kit.records import file_sha256

    path = recipe(tmp_path)
    hashes = set()
    for number in range(2):
        train(path, f"run_dir={tmp_path / str(number)}", "export.merge=false")
        hashes.add(file_sha256(tmp_path / str(number) / "adapter" / "adapter_model.safetensors"))
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "settings",
    [
        ("train.precision=fp16", "quantization.compute_dtype=float16"),
        ("train.optim=paged_adamw_8bit",),
    ],
)
def test_a_run_is_gone_on_with_to_the_bit(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """With the scale of fp16, and with an optimizer's state in paged memory. The folder is as a
    kill after the first checkpoint leaves it.
    """
    from qlora_kit.records import file_sha256

    often = ("train.save_strategy=steps", "train.save_steps=4", "train.save_total_limit=4")
    path = recipe(tmp_path)
    train(path, *settings, *often, "export.merge=false")
    folder = tmp_path / "run"
    weights = folder / "adapter" / "adapter_model.safetensors"
    whole = file_sha256(weights)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoint-8")
    assert (folder / "checkpoint-4").is_dir()
    train(path, *settings, *often, "export.merge=false")
    assert file_sha256(weights) == whole
