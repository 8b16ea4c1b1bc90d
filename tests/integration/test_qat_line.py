"""Quantization-aware training from the command line, to a model that plain transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import equal

from .conftest import Call, write_recipe
from .test_architectures import LLAMA_LIKE, MIXTURES, build

AWARE: dict[str, Any] = {
    "quantization": {"load_in_4bit": False},
    "export": {"merge": True, "merge_options": {"max_kl": 1e-6}},
}


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def require_measured_again(call: Call, run: Path, recipe: Path, evaluation: dict[str, Any]) -> None:
    """A second evaluation of the run, and one of what it ships, come to what it said itself."""
    said = call("evaluate", str(run), "--json")
    assert said.code == 0, said.err
    for name, wanted in evaluation.items():
        again = json.loads(said.out)[name]
        assert again["perplexity"]["perplexity"] == wanted["perplexity"]["perplexity"], name

    said = call("evaluate", str(run / "quantized"), "--recipe", str(recipe), "--json")
    assert said.code == 0, said.err
    shipped = json.loads(said.out)["model"]
    trained = evaluation["tuned"]
    assert shipped["perplexity"]["loss"] == pytest.approx(trained["perplexity"]["loss"], abs=1e-6)
    assert shipped["num_exact"] == trained["num_exact"]


def test_the_whole_line(tmp_path: Path, tiny_llama: Path, call: Call) -> None:
    recipe = write_recipe(
        tmp_path, tiny_llama, quantization_aware={"method": "nf4", "start_after": 0.2}, **AWARE
    )
    said = call("train", str(recipe))
    assert said.code == 0, said.err
    assert "quantized to nf4 in every forward pass after 20% of the updates" in said.out
    assert "tuned (quantized to nf4)" in said.out
    run = tmp_path / "run"
    summary = read(run / "summary.json")
    assert summary["holds"]
    assert summary["certificate"]["dtype"] == "nf4"
    assert summary["certificate"]["divergence"]["kl_mean"] <= 1e-6
    assert summary["training"]["last_loss"] < summary["training"]["first_loss"]
    assert str(run / "quantized") in said.out

    require_measured_again(call, run, recipe, summary["evaluation"])

    said = call(
        "quantize", str(run / "merged"), "--method", "nf4", "--out", str(tmp_path / "again")
    )
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in load_file(run / "quantized" / "model.safetensors").items():
        assert equal(tensor, again[name]), name


@pytest.mark.parametrize("method", ["nf4", "int8", "int4-group"])
def test_fused_layers(method: str, tmp_path: Path, call: Call) -> None:
    aware = {"method": method, **({"group_size": 32} if method == "int4-group" else {})}
    model = build(tmp_path / "model", "Phi3", LLAMA_LIKE)
    recipe = write_recipe(tmp_path, model, quantization_aware=aware, **AWARE)
    said = call("train", str(recipe), "train.max_steps=3", "evaluate.generate=null")
    assert said.code == 0, said.err
    assert "it/s" not in said.err, "a bar of a library"
    assert "left to PEFT (quantized while it is trained)" in said.out
    certificate = read(tmp_path / "run/quantized/certificate.json")
    assert certificate["dtype"] == method
    assert certificate["divergence"]["kl_mean"] <= 1e-6


def test_a_mixture_is_refused_before_anything_is_written(tmp_path: Path, call: Call) -> None:
    model = build(tmp_path / "model", *MIXTURES["mixtral"])
    recipe = write_recipe(tmp_path, model, quantization_aware={"method": "nf4"}, **AWARE)
    said = call("train", str(recipe))
    assert said.code == 1
    assert "experts" in said.err
    assert not (tmp_path / "run").exists()


def test_check_says_it_without_loading_anything(
    tmp_path: Path, tiny_llama: Path, call: Call
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, quantization_aware={"method": "nf4"})
    said = call("check", str(recipe))
    assert said.code == 1
    assert "quantization_aware" in said.err + said.out
    assert "load_in_4bit: false" in said.err + said.out


FULL: dict[str, Any] = {**AWARE, "lora": {}}


def test_the_whole_line_of_all_weights(tmp_path: Path, tiny_llama: Path, call: Call) -> None:
    recipe = write_recipe(
        tmp_path, tiny_llama, quantization_aware={"method": "nf4", "train": "full"}, **FULL
    )
    said = call("train", str(recipe), "train.learning_rate=3e-3")
    assert said.code == 0, said.err
    assert "all of down_proj ×2, gate_proj ×2" in said.out
    assert "trained weights are quantized to nf4 in every forward pass" in said.out
    assert "train.learning_rate: 0.003 is one for adapters" in said.out + said.err
    assert "LoRA" not in said.out
    run = tmp_path / "run"
    summary = read(run / "summary.json")
    assert summary["holds"]
    assert summary["certificate"]["dtype"] == "nf4"
    assert summary["certificate"]["divergence"]["kl_mean"] <= 1e-6
    assert summary["training"]["last_loss"] < summary["training"]["first_loss"] - 0.5

    require_measured_again(call, run, recipe, summary["evaluation"])


def test_all_weights_killed_and_gone_on_with(tmp_path: Path, tiny_llama: Path, call: Call) -> None:
    """Real processes, one of them killed: it comes to the same bytes, and those are shipped."""
    recipe = write_recipe(
        tmp_path,
        tiny_llama,
        quantization=AWARE["quantization"],
        quantization_aware={"method": "int4-group", "train": "full"},
        lora={},
        export={"merge": False},
    )
    kept = tmp_path / "kept"
    said = call("prove-resume", str(recipe), "--keep", str(kept), "--json")
    assert said.code == 0, said.err
    proof = json.loads(said.out)
    assert proof["holds"]
    assert proof["killed_after"] < 6
    assert proof["whole"]["adapter"] == proof["resumed"]["adapter"]
    said = call("merge", str(kept / "killed"), "--max-kl", "1e-6")
    assert said.code == 0, said.err
    certificate = read(kept / "killed" / "quantized" / "certificate.json")
    assert certificate["divergence"]["kl_mean"] <= 1e-6
    assert certificate["dtype"] == "int4-group"


def test_more_weights_than_the_memory_holds_are_refused_before_anything_is_written(
    tmp_path: Path, tiny_llama: Path, call: Call
) -> None:
    recipe = write_recipe(
        tmp_path, tiny_llama, quantization_aware={"method": "nf4", "train": "full"}, **FULL
    )
    said = call("train", str(recipe), "train.max_memory_mib=1")
    assert said.code == 1
    assert "quantization_aware.train: full takes at least" in said.err
    assert "train.max_memory_mib allows" in said.err
    assert not (tmp_path / "run").exists()
