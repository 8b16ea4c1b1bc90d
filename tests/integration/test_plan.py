"""`qlora-kit plan`, and what a run says beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_kit.errors import HardwareError
from qlora_kit.plan import suggest

from .conftest import Call, FinishedRun, write_recipe


def test_a_plan_is_figures_by_phase_and_component(
    call: Call, tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    said = call(
        "plan", str(recipe), "train.fused_loss=false", "--rows", "--gpu", "RTX 4090", "--json"
    )
    assert said.code == 0
    values = json.loads(said.out)
    assert values["fits"]
    assert values["machine"] == "RTX 4090"
    assert set(values["moments"]) == {"loading", "training", "evaluation"}
    training = values["moments"]["training"]
    assert sum(training["bytes"].values()) == training["total_bytes"]
    assert {
        "4-bit weights",
        "their constants",
        "adapter",
        "activations",
        "logits",
        "optimizer",
    } <= {name for name, size in training["bytes"].items() if size}
    assert not (tmp_path / "run").exists(), "nothing is trained"


def test_what_does_not_fit_is_a_finding(call: Call, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    said = call("plan", str(recipe), "--budget", "1MiB")
    assert said.code == 1
    assert "It does not fit" in said.out
    assert "train.per_device_train_batch_size=1" in said.out
    assert "The smallest budget that would do is" in said.out


def test_what_is_needed_is_shown_before_changes_are_tried(
    call: Call, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of which is a plan of its own: minutes, for a large model."""

    def interrupted(*_: object) -> None:
        raise HardwareError("so far")

    monkeypatch.setattr(suggest, "suggestions", interrupted)
    said = call("plan", str(write_recipe(tmp_path, tiny_llama)), "--budget", "1MiB")
    assert "It does not fit" in said.out
    assert said.err == "error: so far\n"


def test_more_gpus_than_one_are_of_a_named_kind(
    call: Call, tiny_llama: Path, tmp_path: Path
) -> None:
    said = call("plan", str(write_recipe(tmp_path, tiny_llama)), "--gpus", "8")
    assert said.code == 2
    assert said.out == ""
    assert "--gpus 8 says how many of --gpu there are; name that one." in said.err


def test_a_large_budget_gives_unpacked_weights_what_they_can_take(
    call: Call, tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    asked = (str(recipe), "train.memory_budget=500GiB", "--budget", "500GiB")
    assert "; within train.memory_budget: 500GiB" in call("plan", *asked).out.replace("\n", " ")
    said = call("plan", *asked, "--json")
    values = json.loads(said.out)
    taken = values["moments"]["training"]["bytes"]["unpacked weights"]
    assert 0 < values["resident_bytes"] <= taken


def test_an_unknown_gpu_lists_those_that_are_known(
    call: Call, tiny_llama: Path, tmp_path: Path
) -> None:
    said = call("plan", str(write_recipe(tmp_path, tiny_llama)), "--gpu", "RTX 9999")
    assert said.code == 1
    assert "no GPU 'RTX 9999'" in said.err
    assert "RTX 4090" in said.err


@pytest.mark.parametrize("options", [(), ("--rows",), ("--gpu", "RTX 4090", "--json")])
def test_a_model_that_is_not_here_is_one_message(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Whose hub may not be asked, so that nothing is waited for."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = write_recipe(tmp_path, Path("nobody/has-this-model"))
    said = call("plan", str(recipe), *options)
    assert said.code == 1
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: nobody/has-this-model is not on this machine")
    assert "name a local folder" in line
    assert not (tmp_path / "run").exists()


def test_a_run_ends_with_what_was_predicted_beside_what_was_measured(
    finished: FinishedRun,
) -> None:
    summary = json.loads((finished.folder / "summary.json").read_text())
    found = summary["memory"]["training"]
    assert 0.5 < found["predicted_bytes"] / found["measured_bytes"] < 2
    assert found["measured_bytes"] == summary["memory"]["host_peak_bytes"]["training"]
    last = json.loads((finished.folder / "log.jsonl").read_text().splitlines()[-1])
    assert last == {"step": summary["training"]["num_steps"], **found}


def test_what_this_process_did_not_train_is_not_held_against_a_plan(
    call: Call, tmp_path: Path, tiny_llama: Path
) -> None:
    """A run that is gone on with behind its last update."""
    recipe = write_recipe(tmp_path, tiny_llama)
    saving = "train.save_strategy=epoch"
    assert call("train", str(recipe), saving).code == 0
    summary = tmp_path / "run" / "summary.json"
    assert json.loads(summary.read_text())["memory"]["training"]
    summary.unlink()
    again = call("train", str(recipe), saving)
    assert again.code == 0
    assert "plan      predicted" not in again.out
    assert json.loads(summary.read_text())["memory"]["training"] is None
