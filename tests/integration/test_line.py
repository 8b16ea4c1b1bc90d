"""The straight line from the outside: recipe in, certified model out."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_kit.checkpoint.run_directory import RECIPE_RECORD
from qlora_kit.model.quantized import never_repacked
from qlora_kit.recipe import load_recipe
from qlora_kit.records import file_sha256

from .conftest import Call, FinishedRun, write_recipe

ADAPTER = Path("adapter") / "adapter_model.safetensors"


def start(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::FutureWarning"},
    )


def test_one_command_from_recipe_to_certified_model(tmp_path: Path, tiny_llama: Path) -> None:
    """The whole line in a process of its own, as a user starts it."""
    recipe = write_recipe(tmp_path, tiny_llama)
    done = start(sys.executable, "-m", "qlora_kit", "train", str(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "upstream noise reaches the user"
    run = tmp_path / "run"
    for part in ("trained", "certified", "held-out rows", "perplexity", "qlora-kit chat"):
        assert part in done.stdout
    assert json.loads((run / "summary.json").read_text())["holds"] is True
    assert not list(run.rglob("*.part")), "something half-written was left"

    certificate = json.loads((run / "merged" / "certificate.json").read_text())
    assert certificate["passed"] is True
    assert certificate["divergence"]["kl_mean"] < 1e-8
    assert certificate["divergence"]["top1_agreement"] == 1.0

    again = start(sys.executable, "-m", "qlora_kit", "train", str(recipe), cwd=tmp_path)
    assert again.returncode == 0
    assert "is finished" in again.stdout


def test_a_run_says_which_optimizer_auto_was(tmp_path: Path, tiny_llama: Path, call: Call) -> None:
    """In its own recipe, by which it is gone on with anywhere, and is known when it is finished."""
    few = ("train.max_steps=2", "evaluate.generate=null", "export.merge=false")
    path = write_recipe(tmp_path, tiny_llama)
    assert load_recipe(path).train.optim == "auto"
    said = call("train", str(path), *few, "train.save_strategy=epoch")
    assert said.code == 0, said.err
    assert "optimizer adamw_torch_fused (auto: faster on a CPU" in " ".join(said.out.split())
    run = tmp_path / "run"
    (checkpoint,) = run.glob("checkpoint-*")
    for record in (run / "recipe.yaml", checkpoint / RECIPE_RECORD):
        assert load_recipe(record).train.optim == "adamw_torch_fused"
    again = call("train", str(path), *few, "train.save_strategy=epoch")
    assert "is finished" in again.out
    other = call("train", str(path), *few, "train.optim=sgd")
    assert "train.optim: adamw_torch_fused → sgd" in " ".join(other.err.split())


def test_merged_folder_is_what_was_trained(finished: FinishedRun) -> None:
    """Plain transformers on the merged folder against PEFT on the 4-bit base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora_kit.subject import load_subject

    subject = load_subject(str(finished.folder))
    merged = AutoModelForCausalLM.from_pretrained(finished.folder / "merged")
    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "merged")
    ids = torch.tensor([tokenizer("paint the lamp red")["input_ids"]])
    assert tokenizer.chat_template == subject.base.tokenizer.chat_template
    with torch.no_grad():
        expected = subject.model(input_ids=ids).logits
        got = merged(input_ids=ids).logits
        with subject.model.disable_adapter():
            untrained = subject.model(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (untrained - expected).abs().max() > 0.1
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_run_folder_holds_what_the_readme_says(finished: FinishedRun) -> None:
    evaluation = json.loads((finished.folder / "evaluation.json").read_text())
    assert evaluation["tuned"]["perplexity"]["loss"] < evaluation["base"]["perplexity"]["loss"]
    assert evaluation["tuned"]["perplexity"]["perplexity"] == pytest.approx(
        math.exp(evaluation["tuned"]["perplexity"]["loss"])
    )
    ledger = json.loads((finished.folder / "data" / "ledger.json").read_text())
    assert ledger["train"]["rows"]["read"] == 48
    lines = [json.loads(one) for one in (finished.folder / "log.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 1
    environment = json.loads((finished.folder / "environment.json").read_text())
    assert environment["hardware"]["num_cpus"] >= 1


def test_resolved_recipe_gives_the_same_adapter(
    finished: FinishedRun, tmp_path: Path, call: Call
) -> None:
    """`recipe.yaml` of a run runs again unchanged, to the same bytes."""
    copy = finished.folder / "recipe.yaml"
    said = call("train", str(copy), f"run_dir={tmp_path / 'again'}", "export.merge=false")
    assert said.code == 0, said.err
    assert file_sha256(tmp_path / "again" / ADAPTER) == file_sha256(finished.folder / ADAPTER)


def test_fresh_trains_beside_and_touches_nothing(
    finished: FinishedRun, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    said = call("train", str(finished.recipe), "--fresh", "train.max_steps=1", "export.merge=false")
    assert said.code == 0, said.err
    beside = finished.folder.with_name("run-2")
    assert load_recipe(beside / "recipe.yaml").run_dir == str(beside)
    assert {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")} == before


def test_evaluate_agrees_with_the_run(finished: FinishedRun, call: Call) -> None:
    said = call("evaluate", str(finished.folder), "--json")
    assert said.code == 0, said.err
    stored = json.loads((finished.folder / "evaluation.json").read_text())
    measured = json.loads(said.out)
    for name in ("base", "tuned"):
        assert measured[name]["perplexity"]["loss"] == pytest.approx(
            stored[name]["perplexity"]["loss"], rel=1e-6
        )
        assert measured[name]["exact_match"] == stored[name]["exact_match"]


def test_evaluate_the_merged_model_gives_the_tuned_figures(
    finished: FinishedRun, call: Call
) -> None:
    merged = str(finished.folder / "merged")
    refused = call("evaluate", merged)
    assert refused.code == 2
    assert "--recipe" in refused.err
    said = call("evaluate", merged, "--recipe", str(finished.recipe), "--json")
    assert said.code == 0, said.err
    stored = json.loads((finished.folder / "evaluation.json").read_text())["tuned"]
    assert json.loads(said.out)["model"]["perplexity"]["loss"] == pytest.approx(
        stored["perplexity"]["loss"], rel=1e-4
    )


def test_merge_exit_code_is_the_budgets(finished: FinishedRun, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "merged"
    arguments = ("merge", str(finished.folder), "--base", "original")
    over = call(*arguments, "--out", str(out), "--max-kl", "1e-9", "--json")
    assert over.code == 1
    assert json.loads(over.out)["passed"] is False
    taken = call(*arguments, "--out", str(out))
    assert taken.code == 1
    assert "exists already" in taken.err
    within = call(*arguments, "--out", str(tmp_path / "other"), "--max-kl", "50")
    assert within.code == 0, within.err


@pytest.mark.parametrize(
    "launcher",
    [
        ("accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--cpu"),
        ("torchrun", "--nproc-per-node", "1"),
    ],
)
def test_launchers_give_the_same_adapter(
    finished: FinishedRun, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    program = str(Path(sys.executable).with_name(launcher[0]))
    done = start(
        program,
        *launcher[1:],
        "-m",
        "qlora_kit",
        "train",
        str(finished.folder / "recipe.yaml"),
        f"run_dir={tmp_path / 'launched'}",
        "export.merge=false",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert file_sha256(tmp_path / "launched" / ADAPTER) == file_sha256(finished.folder / ADAPTER)


def test_dequantize_gives_what_the_quantized_model_computes(
    tmp_path: Path, tiny_llama: Path, call: Call
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=nf4)
    never_repacked(quantized)
    quantized.save_pretrained(tmp_path / "nf4")
    out = tmp_path / "dense"
    said = call("dequantize", str(tmp_path / "nf4"), "--out", str(out), "--dtype", "float32")
    assert said.code == 0, said.err
    assert "same top token 100.00%" in said.out
    dense = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, quantized(ids).logits, rtol=1e-4, atol=1e-4)
    refused = call("dequantize", str(tiny_llama), "--out", str(tmp_path / "other"))
    assert refused.code == 1
    assert "is not quantized" in refused.err
    assert not (tmp_path / "other").exists()


def test_a_merge_beyond_its_budget_is_not_offered_as_if_all_were_well(
    tiny_llama: Path, tmp_path: Path, call: Call
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    changes = ("train.max_steps=2", "evaluate.generate=null", "export.merge_options.max_kl=1e-30")
    said = call("train", str(recipe), *changes)
    assert said.code == 1
    assert "OVER BUDGET" in said.out
    assert "M.from_pretrained" not in said.out
    assert "certificate.json tells how far" in said.out.replace("\n", " ")
    assert (tmp_path / "run/merged/certificate.json").is_file()
