"""Whatever is wrong: one message that says what, got, do; exit code 1; nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import build_llama
from safetensors.torch import load_file

from qlora_kit.model.manifest import MANIFEST_FILE
from qlora_kit.records import file_sha256

from .conftest import Call, FinishedRun, write_recipe, write_rows

Spoil = Callable[[Path, Path], list[str]]
"""Damages (folder, copied model) and returns overrides."""


def no_weights(folder: Path, model: Path) -> list[str]:
    (model / "model.safetensors").unlink()
    return []


def truncated_weights(folder: Path, model: Path) -> list[str]:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return []


def no_template(folder: Path, model: Path) -> list[str]:
    (model / "chat_template.jinja").unlink()
    return []


def empty_data(folder: Path, model: Path) -> list[str]:
    (folder / "train.jsonl").write_text("")
    return []


def data_is_a_folder(folder: Path, model: Path) -> list[str]:
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").mkdir()
    return []


def data_is_a_dead_link(folder: Path, model: Path) -> list[str]:
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").symlink_to(folder / "gone.jsonl")
    return []


def data_is_not_text(folder: Path, model: Path) -> list[str]:
    """Its 49th line is in Latin-1, as a spreadsheet writes it."""
    with (folder / "train.jsonl").open("ab") as file:
        file.write('{"prompt": "é", "completion": "x"}\n'.encode("latin-1"))
    return []


def data_is_forbidden(folder: Path, model: Path) -> list[str]:
    path = folder / "train.jsonl"
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads files that nobody may read")
    return []


def broken_json(folder: Path, model: Path) -> list[str]:
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"messages": [\n')
    return []


def nothing_supervised(folder: Path, model: Path) -> list[str]:
    write_rows(folder / "train.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    return []


def too_long(folder: Path, model: Path) -> list[str]:
    return ["data.max_length=8"]


def weights_as_pickles(folder: Path, model: Path) -> list[str]:
    pickle_weights(model)
    return []


def code_of_its_own(folder: Path, model: Path) -> list[str]:
    """It would leave a file behind when it runs."""
    config = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (model / "config.json").write_text(
        json.dumps({**config, "model_type": "own", "auto_map": names})
    )
    (model / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    return []


def code_of_its_own_tokenizer(folder: Path, model: Path) -> list[str]:
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    }
    path.write_text(json.dumps(config))
    (model / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    return []


def pickle_weights(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def taken_folder(folder: Path, model: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "notes.txt").write_text("mine")
    return []


def override(*values: str) -> Spoil:
    return lambda folder, model: list(values)


CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "no weights": (no_weights, ("weights",)),
    "truncated shard": (truncated_weights, ("model.safetensors",)),
    "no chat template": (no_template, ("chat template", "model.chat_template")),
    "empty data": (empty_data, ("train.jsonl",)),
    "data is a folder": (data_is_a_folder, ("train.jsonl", "is a folder")),
    "data is a dead link": (
        data_is_a_dead_link,
        ("train.jsonl", "a link to a file that is not there"),
    ),
    "data is not text": (data_is_not_text, ("train.jsonl", "UTF-8")),
    "data is forbidden": (data_is_forbidden, ("train.jsonl", "Permission denied")),
    "pickles": (weights_as_pickles, ("pytorch_model.bin", "model.allow_pickle: true")),
    "remote code": (code_of_its_own, ("own Python code", "model.trust_remote_code: true")),
    "remote code of the tokenizer": (
        code_of_its_own_tokenizer,
        ("own Python code", "model.trust_remote_code: true"),
    ),
    "broken JSON": (broken_json, ("train.jsonl:49", "not JSON")),
    "nothing supervised": (nothing_supervised, ("no answer", "train.jsonl:1")),
    "rows too long": (too_long, ("longer than max_length",)),
    "folder taken": (taken_folder, ("not empty", "run-2")),
    "unknown key": (override("lora.rnak=3"), ("lora.rnak", "unknown key")),
    "wrong type": (override("train.max_steps=ten"), ("train.max_steps", "ten")),
    "out of range": (override("lora.r=0"), ("lora.r", "greater than 0")),
    "contradiction": (
        override("quantization.load_in_4bit=true", "quantization.load_in_8bit=true"),
        ("load_in_8bit", "choose one"),
    ),
    "no such model": (override("model.name_or_path=./nowhere"), ("nowhere",)),
    "no such data": (override("data.train.0.path=nowhere.jsonl"), ("nowhere.jsonl",)),
    "pissa": (override("lora.init=pissa"), ("lora.init", "loftq")),
    "tracker missing": (override("train.report_to=[wandb]"), ("wandb is not installed", "pip")),
    "targets nothing": (override("lora.target_modules=[nonsense]"), ("nonsense", "q_proj")),
    "bf16 on this CPU": (override("train.precision=bf16"), ("bf16",)),
    "TF32 on a CPU": (override("train.tf32=true"), ("TF32",)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_message_and_nothing_written(
    name: str, tmp_path: Path, tiny_llama: Path, call: Call
) -> None:
    spoil, words = CASES[name]
    if name == "bf16 on this CPU":
        from qlora_kit.environment import probe_hardware

        here = probe_hardware()
        if here.native_bf16 or here.slow_bf16:
            pytest.skip("this machine has native bfloat16")
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    recipe = write_recipe(tmp_path, model)
    overrides = spoil(tmp_path, model)
    before = sorted(path for path in tmp_path.rglob("*"))
    said = call("train", str(recipe), *overrides)
    assert said.code == 1
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err
    assert sorted(path for path in tmp_path.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("verb", ["evaluate", "compare", "quantize", "sensitivity"])
def test_a_model_that_cannot_be_computed_with(verb: str, tmp_path: Path, call: Call) -> None:
    """Heads of odd width are loaded without a word, and no rotary embedding fits them."""
    model = build_llama(tmp_path / "model", head_dim=7)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"{n} lamps glow."} for n in range(40)])
    recipe = write_recipe(tmp_path, model)
    arguments = {
        "evaluate": ("--recipe", recipe),
        "compare": (model, "--recipe", recipe, "--repetitions", "0"),
        "quantize": ("--method", "nf4", "--out", tmp_path / "out", "--data", rows),
        "sensitivity": ("--cheap", "--num-tokens", "64", "--window-tokens", "16", "--data", rows),
    }
    before = sorted(tmp_path.rglob("*"))
    said = call(verb, str(model), *map(str, arguments[verb]))
    assert said.code == 1
    assert "Traceback" not in said.err
    assert "error: " in said.err
    for word in (str(model), "llama", "cannot be run", "config.json"):
        assert word in said.err
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ("no such file",)),
        ("model: {name_or_path: x", ("line 1",)),
        ("model: {name_or_path: x}\nmodel: {name_or_path: y}\n", ("already set on line 1",)),
        ("", ("is empty",)),
        ("- a\n- b\n", ("mapping",)),
        ("model: {name_or_path: x}\n", ("data", "required")),
    ],
)
def test_recipes_that_are_none(
    text: str | None, words: tuple[str, ...], tmp_path: Path, call: Call
) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    for verb in ("check", "train"):
        said = call(verb, str(path))
        assert said.code == 1
        assert all(word in said.err for word in words), said.err


def test_adapter_of_another_base_is_refused(
    tmp_path: Path, finished: FinishedRun, call: Call
) -> None:
    """The base's folder now holds other weights of the same shapes."""
    other = build_llama(tmp_path / "other", seed=5)
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    recipe = json.loads(json.dumps(_yaml(run / "recipe.yaml")))
    recipe["model"]["name_or_path"] = str(other)
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    said = call("evaluate", str(run))
    assert said.code == 1
    assert "does not belong to this base" in said.err
    assert "--force" in said.err
    forced = call("evaluate", str(run), "--force")
    assert forced.code == 0, forced.err
    assert "forced onto another base" in forced.out


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file's SHA-256 and time of change."""
    return {
        str(path.relative_to(folder)): (file_sha256(path), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_adapter_of_another_base_is_not_merged(
    tmp_path: Path, finished: FinishedRun, call: Call
) -> None:
    """Not the run's, and not the adapter's alone; forced, the certificate has the last word."""
    other = build_llama(tmp_path / "other", seed=5)
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run, ignore=shutil.ignore_patterns("merged"))
    recipe = _yaml(run / "recipe.yaml")
    recipe["model"]["name_or_path"] = str(other)
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    adapter = tmp_path / "adapter"
    shutil.copytree(finished.folder / "adapter", adapter)
    manifest = json.loads((adapter / MANIFEST_FILE).read_text())
    (adapter / MANIFEST_FILE).write_text(json.dumps({**manifest, "base_name": str(other)}))
    rows = str(finished.recipe.with_name("held-out.jsonl"))
    out = tmp_path / "out"
    before = contents(tmp_path)
    for subject in (run, adapter):
        said = call("merge", str(subject), "--data", rows, "--out", str(out))
        assert said.code == 1
        assert said.err.startswith("error: ")
        assert "does not belong to this base" in said.err
        assert "the weights: " in said.err
        assert "Traceback" not in said.err
        assert contents(tmp_path) == before
        assert not out.exists()
    forced = call("merge", str(run), "--data", rows, "--out", str(out), "--force")
    assert forced.code == 0, forced.err
    assert "forced onto another base: the weights" in forced.out
    assert json.loads((out / "certificate.json").read_text())["passed"]


def test_a_folder_that_holds_another_run_is_left_as_it_is(
    tmp_path: Path, finished: FinishedRun, call: Call
) -> None:
    """Whether that one is finished or not; the recipe differs in one number."""
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    arguments = ("train", str(finished.recipe), f"run_dir={run}", "train.max_steps=1")
    for state in ("already holds a finished run", "was begun otherwise:\n  - train.max_steps: 20"):
        before = contents(tmp_path)
        said = call(*arguments)
        assert said.code == 1
        assert said.err.startswith("error: ")
        assert state in said.err
        assert "--fresh" in said.err
        assert contents(tmp_path) == before
        (run / "summary.json").unlink(missing_ok=True)


def test_pickles_train_and_merge_when_asked_for(
    tmp_path: Path, tiny_llama_untied: Path, call: Call
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama_untied, model)
    pickle_weights(model)
    recipe = write_recipe(tmp_path, model)
    said = call(
        "train",
        str(recipe),
        "model.allow_pickle=true",
        "train.max_steps=1",
        "evaluate.generate=null",
        "export.merge_options={base: original, max_kl: 10}",
    )
    assert said.code == 0, said.err
    assert (tmp_path / "run/merged/model.safetensors").is_file()
    assert not list((tmp_path / "run").rglob("*.bin")), "what is exported is no pickle"


def _yaml(path: Path) -> dict[str, dict[str, object]]:
    from qlora_kit.recipe.yaml import parse_yaml

    values = parse_yaml(path.read_text(), str(path))
    assert isinstance(values, dict)
    return values


def test_unknown_run(tmp_path: Path, call: Call) -> None:
    for verb in ("merge", "evaluate"):
        said = call(verb, str(tmp_path / "nowhere"))
        assert said.code == 1
        assert "nowhere" in said.err


def test_bad_usage_is_exit_code_2(call: Call) -> None:
    assert call("train").code == 2
    assert call("nonsense").code == 2
    assert call("merge", "x", "--base", "sideways").code == 2
