"""bench_train: the configurations written for other tools, and which sides compare."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plainly import Fault
from train_bench import table
from train_bench.registry import SIDES, turns
from train_bench.sides import axolotl, llama_factory, torchtune, trl, unsloth
from train_bench.told import Told
from train_bench.watch import Outcome, watched
from train_bench.work import RANK, Work, dealt, without_dropout

from qlora_kit.data.sequences import TokenSequence

SCRIPT = Path(__file__).parents[3] / "scripts" / "bench_train.py"
ROW = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
WORK = Work(
    model="base",
    adapter="adapter",
    batch=2,
    accumulation=1,
    recompute="auto",
    precision="fp32",
    device="cpu",
    threads=1,
    optimizer="adamw_torch",
    learning_rate=2e-4,
    updates=[[ROW, {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}], [ROW, ROW]],
)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}


def outcome(label: str, losses: list[float], seconds: float = 1.0) -> Outcome:
    """A run whose updates take so long each."""
    ends = [seconds * (n + 1) for n in range(len(losses))]
    return Outcome(label, losses, ends, ends, "none", {}, 100, {}, 1.0, 1.0)


def test_dropout_of_a_model_is_off_for_every_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what its configuration leaves to its family's defaults; all else is as it was."""
    base = tmp_path / "gpt2"
    base.mkdir()
    written = {"model_type": "gpt2", "n_layer": 1, "attn_pdrop": 0.2, "embd_pdrop": 0.0}
    (base / "config.json").write_text(json.dumps(written))
    (base / "model.safetensors").write_text("weights")
    made = without_dropout(base, tmp_path / "base")
    assert made == tmp_path / "base"
    assert (made / "model.safetensors").read_text() == "weights"
    off = json.loads((made / "config.json").read_text())
    assert off == {
        **written,
        **dict.fromkeys(("attn_pdrop", "resid_pdrop"), 0.0),
    }
    assert "resid_pdrop 0.1, attn_pdrop 0.2" in capsys.readouterr().out
    (base / "config.json").write_text(json.dumps(LLAMA))
    assert without_dropout(base, tmp_path / "again") == base


def test_rows_for_others_have_a_mask_and_their_order() -> None:
    assert [len(row["attention_mask"]) for row in WORK.rows] == [3, 4, 3, 3]
    assert WORK.rows[0]["input_ids"] == ROW["input_ids"]
    assert WORK.longest == 4


@pytest.mark.parametrize(("num_rows", "is_fine"), [(8, True), (4, True), (6, False), (9, True)])
def test_a_pass_over_the_rows_ends_with_a_whole_update(num_rows: int, is_fine: bool) -> None:
    """Where the rows are enough for all updates, none ends within them."""
    rows = [TokenSequence(input_ids=(n, n), labels=(n, n), origin="") for n in range(num_rows)]
    arguments = argparse.Namespace(batch=2, accumulation=2, updates=2)
    if is_fine:
        updates = dealt(rows, arguments)
        assert [row["input_ids"][0] % num_rows for one in updates for row in one] == [
            n % num_rows for n in range(8)
        ]
    else:
        with pytest.raises(Fault, match="2 updates of 4 rows take 8 rows, got 6"):
            dealt(rows, arguments)


def test_plain_recomputes_nothing_and_all_where_each_has_its_default() -> None:
    labels = [turn.label for turn in turns(["kit", "plain", "axolotl"], "auto")]
    assert labels == ["kit", "plain none", "plain all", "axolotl"]
    assert [turn.recompute for turn in turns(["kit", "plain"], "all")] == ["all", "all"]


@pytest.mark.parametrize("side", SIDES)
def test_each_side_has_a_module(side: str) -> None:
    path = SCRIPT.parent / (SIDES[side].module.replace(".", "/") + ".py")
    assert "def train(work: Work" in path.read_text()


def test_llama_factory_has_the_same_work(tmp_path: Path) -> None:
    values = llama_factory.configuration(WORK, tmp_path)
    assert values["adapter_name_or_path"] == "adapter"
    assert values["quantization_bit"] == 4
    assert values["double_quantization"]
    assert values["disable_shuffling"]
    assert values["max_steps"] == 2
    assert values["weight_decay"] == 0.0
    assert values["max_grad_norm"] == 1.0
    assert values["bf16"] is False


def test_llama_factory_is_left_its_default_of_recomputing(tmp_path: Path) -> None:
    def told(recompute: str) -> bool | None:
        work = replace(WORK, recompute=recompute)
        return llama_factory.configuration(work, tmp_path).get("disable_gradient_checkpointing")

    assert [told(one) for one in ("auto", "all", "none")] == [None, False, True]


def test_trl_is_left_its_default_of_recomputing(tmp_path: Path) -> None:
    def told(recompute: str) -> bool | None:
        work = replace(WORK, recompute=recompute)
        return trl.configuration(work, tmp_path).get("gradient_checkpointing")

    assert [told(one) for one in ("auto", "all", "none")] == [None, True, False]


def test_unsloth_has_the_same_work(tmp_path: Path) -> None:
    work = replace(WORK, device="cuda", precision="bf16")
    assert unsloth.loading(work)["max_seq_length"] == 4
    values = unsloth.adapting(work)
    assert (values["r"], values["lora_dropout"]) == (RANK, 0.0)
    told = [unsloth.adapting(replace(work, recompute=one)) for one in ("auto", "all", "none")]
    assert [one["use_gradient_checkpointing"] for one in told] == ["unsloth", True, False]
    assert trl.configuration(work, tmp_path)["use_cpu"] is False


def test_axolotl_has_the_same_work(tmp_path: Path) -> None:
    values = axolotl.configuration(WORK, tmp_path)
    assert values["lora_model_dir"] == "adapter"
    assert values["load_in_4bit"]
    assert values["curriculum_sampling"]
    assert not values["shuffle_merged_datasets"]
    assert values["sequence_len"] == 4
    assert not values["sample_packing"]
    assert values["gradient_checkpointing"] is True
    assert not axolotl.configuration(replace(WORK, recompute="none"), tmp_path)[
        "gradient_checkpointing"
    ]


def test_torchtune_has_the_base_of_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").touch()
    values = torchtune.configuration(replace(WORK, model=str(tmp_path)), tmp_path / "folder")
    assert values["model"]["embed_dim"] == 576
    assert values["model"]["rope_base"] == 100000.0
    assert values["model"]["lora_rank"] == RANK
    assert values["model"]["max_seq_len"] == 4
    assert values["checkpointer"]["checkpoint_files"] == ["model.safetensors"]
    assert values["enable_activation_checkpointing"] is False


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"model_type": "gemma2"}, "knows a Llama"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "scaled positions"),
        ({}, "576 × 576"),
    ],
)
def test_torchtune_objects_to_what_it_cannot_quantize(
    tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **other}))
    assert said in (torchtune.objection(tmp_path) or "")


def test_torchtune_takes_whole_blocks(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **shape}))
    assert torchtune.objection(tmp_path) is None


def test_torchtune_names_an_adapters_tensors() -> None:
    key = "base_model.model.model.layers.7.mlp.down_proj.lora_A.weight"
    assert torchtune.tune_name(key) == "layers.7.mlp.w2.lora_a.weight"


def test_torchtune_log_takes_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchtune, "TOLD", Told())
    torchtune.Log().log_dict({"loss": 2.5, "lr": 1.0}, step=1)
    assert torchtune.TOLD.losses == [2.5]
    assert len(torchtune.TOLD.ends) == 1


def test_difference_of_losses() -> None:
    assert table.difference([1.0, 2.0], [1.0, 2.0]).relative == 0
    assert table.difference([1.0, 2.2], [1.0, 2.0]) == table.Apart(pytest.approx(0.1), 2)
    assert table.difference([1.0], [1.0, 2.0]) == table.Apart(math.inf, 0)
    assert table.difference([1.0, math.nan, 9.0], [1.0, 2.0, 1.0]) == table.Apart(math.inf, 2)


def test_a_side_that_differs_has_no_ratio_and_others_do() -> None:
    row = [
        outcome("kit", [2.0, 1.0]),
        outcome("plain", [2.0, 1.0], seconds=2),
        outcome("torchtune", [2.1, 1.0]),
    ]
    differences = table.loss_differences({one.label: [one] for one in row})
    assert differences["kit"].relative == 0
    assert differences["torchtune"] == table.Apart(pytest.approx(0.05), 1)
    ratios = table.against_kit([row], {"torchtune"})
    assert list(ratios) == ["plain"]
    assert ratios["plain"]["speed"] == "2.00 (2.00-2.00)"
    assert table.against_kit([row], {"kit"}) == {}


def test_memory_of_a_gpu_is_compared_where_there_is_one() -> None:
    peaks = {"kit": 200, "plain": 400}
    row = [
        replace(outcome(one, [1.0, 1.0]), device_peaks={"allocated": size, "reserved": 500})
        for one, size in peaks.items()
    ]
    ratios = table.against_kit([row], set())["plain"]
    assert ratios["allocated on the GPU"] == "0.50 (0.50-0.50)"
    assert ratios["reserved on the GPU"] == "1.00 (1.00-1.00)"
    assert "allocated on the GPU" not in table.ratios_of(
        [(outcome("kit", [1.0, 1.0]), outcome("plain", [1.0, 1.0]))]
    )


def test_a_side_that_differs_is_named_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    apart = {"plain": table.Apart(0.0, 1), "torchtune": table.Apart(0.05, 7)}
    assert table.judged(apart, {"torchtune"}, 1e-4) == 1
    said = capsys.readouterr()
    assert "plain 0, torchtune 0.05 (update 7)" in said.out
    assert "torchtune: its losses differ by up to 0.05 (update 7)" in said.err
    assert table.judged({"plain": table.Apart(0, 1), "kit": table.Apart(1e-6, 2)}, set(), 1e-4) == 0


@pytest.mark.parametrize(("slowest", "is_warned"), [(75.0, False), (60.0, True)])
def test_how_steady_the_machine_was_is_told(
    slowest: float, is_warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [{"gauge_before": 80.0, "gauge_after": slowest}]
    table.show_trust(table.variation({"kit": {"runs": runs}}))
    said = capsys.readouterr()
    assert f"trust: the gauge varied by {80 / slowest - 1:.0%}" in said.out
    assert ("neighbours were at work" in said.err) == is_warned


def test_a_line_that_neighbours_slowed_is_told() -> None:
    figures = {"kit": {"gauge": 80.0}, "trl": {"gauge": 79.0}, "axolotl": {"gauge": 20.0}}
    assert table.disturbed(figures) == {"axolotl": 0.25}


def test_losses_are_held_against_plain() -> None:
    assert table.reference(["kit", "plain none", "trl"]) == "plain none"
    assert table.reference(["kit", "trl"]) == "kit"


def spoken(*options: str) -> subprocess.CompletedProcess[str]:
    """The script with options that it cannot follow."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--updates", "1"], "--updates must be at least 2, got 1"),
        (["--sides", "kit", "trl"], "trl needs --trl"),
        (["--sides", "axolotl", "--axolotl", "nowhere/python"], "nowhere/python is not there"),
        (["--sides", "axolotl", "--axolotl", __file__], "is no Python that runs"),
        (
            ["--sides", "llama-factory", "--llama-factory", sys.executable],
            "has no llamafactory; install it there.\nNo side is left to run.",
        ),
        (["--rows", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--sides", "unsloth", "--device", "cpu"], "unsloth needs a GPU"),
    ],
)
def test_a_foreseeable_fault_is_one_message(options: list[str], said: str) -> None:
    ended = spoken(*options)
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_process_that_starts_others_is_counted_once() -> None:
    """Just forked, each of them seems to have all the memory of the one that starts it."""
    code = (
        "import subprocess, time\n"
        "held = b'x' * (300 << 20)\n"
        "for _ in range(40): subprocess.run(['true'], preexec_fn=lambda: time.sleep(0.05))\n"
    )
    peak = watched(subprocess.Popen([sys.executable, "-W", "ignore", "-c", code]))
    assert 300 << 20 < peak < 400 << 20
