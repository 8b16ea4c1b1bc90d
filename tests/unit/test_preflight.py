"""What a recipe names, looked up before any work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_kit import extras
from qlora_kit.errors import Fault, RecipeError
from qlora_kit.preflight import DEMO_MODELS, load_checked, looks_local, preflight
from qlora_kit.recipe import recipe_from_dict
from qlora_kit.recipe.data import COMPRESSED_ENDINGS, FILE_ENDINGS


def faults_of(model: dict[str, Any], *train: dict[str, Any]) -> list[Fault]:
    rows = list(train) or [{"path": "demo/commands"}]
    return preflight(recipe_from_dict({"model": model, "data": {"train": rows}}, "x"))


def check(faults: list[Fault], path: str, *pieces: str) -> None:
    (fault,) = faults
    assert fault.path == path
    for piece in pieces:
        assert piece in str(fault), str(fault)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder in which nothing is amiss."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": np.zeros(4, dtype=np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "hello"}\n')
    return path


def test_nothing_amiss(folder: Path, rows: Path) -> None:
    template = folder / "chat.jinja"
    template.write_text("{{ messages }}")
    model = {"name_or_path": str(folder), "chat_template": str(template)}
    assert faults_of(model, {"path": str(rows)}, {"path": "demo/commands", "split": "test"}) == []


class TestARecipeWithFaultsOfBothKinds:
    def faults(self, path: Path, text: str) -> list[str]:
        path.write_text(text)
        with pytest.raises(RecipeError) as refused:
            load_checked(path)
        return [fault.path for fault in refused.value.faults]

    def test_names_a_misspelt_key_and_a_missing_file_at_once(self, tmp_path: Path) -> None:
        text = (
            "model: {name_or_path: ./nowhere}\n"
            "data: {train: [{path: nothing.jsonl}]}\n"
            "lora: {rr: 8}\n"
            "export: {to: [gguff]}\n"
        )
        paths = self.faults(tmp_path / "recipe.yaml", text)
        assert paths == ["lora.rr", "export.to", "model.name_or_path", "data.train.0.path"]

    def test_looks_nothing_up_for_a_section_at_fault(self, tmp_path: Path) -> None:
        text = "model: {name_or_path: ./nowhere, name: x}\ndata: {train: [{path: demo/commands}]}\n"
        assert self.faults(tmp_path / "recipe.yaml", text) == ["model.name"]

    def test_what_is_no_recipe_is_told_once(self, tmp_path: Path) -> None:
        assert self.faults(tmp_path / "recipe.yaml", "- a\n") == [""]


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "gpt2", *DEMO_MODELS])
def test_hub_ids_and_demos_pass(name: str) -> None:
    assert faults_of({"name_or_path": name}, {"path": "owner/rows", "split": "any"}) == []


def test_paths_start_in_the_working_directory(
    folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert faults_of({"name_or_path": "model"}, {"path": "rows.jsonl"}) == []
    monkeypatch.chdir(folder)
    assert faults_of({"name_or_path": "../model"}, {"path": "../rows.jsonl"}) == []
    check(faults_of({"name_or_path": "./model"}), "model.name_or_path", str(folder))


def test_a_tilde_is_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert faults_of({"name_or_path": "~/model"}) == []
    check(faults_of({"name_or_path": "~/other"}), "model.name_or_path", "there is no folder")


@pytest.mark.parametrize("name", ["./missing", "../missing", "/missing", "a/b/missing"])
def test_a_missing_folder(name: str) -> None:
    check(faults_of({"name_or_path": name}), "model.name_or_path", "there is no folder")


def test_unknown_demos() -> None:
    model = {"name_or_path": "demo/big", "tokenizer_name_or_path": "demo/small"}
    faults = faults_of(model, {"path": "demo/x"}, {"path": "demo/commands", "split": "dev"})
    assert [fault.path for fault in faults] == [
        "model.name_or_path",
        "model.tokenizer_name_or_path",
        "data.train.0.path",
        "data.train.1.split",
    ]
    assert "demo/smollm2-135m-instruct" in str(faults[0])
    assert "demo/commands" in str(faults[2])
    assert "train, test" in str(faults[3])


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    key = "model.name_or_path"
    check(faults_of({"name_or_path": str(folder)}), key, "no config.json")
    (folder / "adapter_config.json").write_text("{}")
    check(faults_of({"name_or_path": str(folder)}), key, "an adapter, not a model")


def test_a_folder_of_gguf_files(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "q4.gguf").write_bytes(b"GGUF....")
    check(faults_of({"name_or_path": str(folder)}), "model.name_or_path", "gguf_file: q4.gguf")
    assert faults_of({"name_or_path": str(folder), "gguf_file": "q4.gguf"}) == []
    missing = {"name_or_path": str(folder), "gguf_file": "q8.gguf"}
    check(faults_of(missing), "model.gguf_file", "there is no file")


def test_gguf_files(tmp_path: Path) -> None:
    key, path = "model.name_or_path", tmp_path / "m.gguf"
    check(faults_of({"name_or_path": str(path)}), key, "there is no file")
    path.write_bytes(b"<htm")
    check(faults_of({"name_or_path": str(path)}), key, "not a GGUF file", "<htm")
    path.write_bytes(b"GGUF....")
    assert faults_of({"name_or_path": str(path)}) == []


def test_weights_missing_truncated_or_pickled(folder: Path) -> None:
    key, weights = "model.name_or_path", folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    check(faults_of({"name_or_path": str(folder)}), key, "truncated", weights.name)
    weights.unlink()
    check(faults_of({"name_or_path": str(folder)}), key, "holds no weights")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    check(faults_of({"name_or_path": str(folder)}), key, "pickles", "allow_pickle: true")
    assert faults_of({"name_or_path": str(folder), "allow_pickle": True}) == []


def test_everything_wrong_with_a_folder_at_once(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    messages = " ".join(map(str, faults_of({"name_or_path": str(folder)})))
    assert "is not JSON" in messages
    assert "holds no weights" in messages
    assert "set model.tokenizer_name_or_path" in messages


def test_a_tokenizer_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    model = {"name_or_path": str(folder)}
    assert faults_of({**model, "tokenizer_name_or_path": "owner/tokenizer"}) == []
    key = "model.tokenizer_name_or_path"
    check(faults_of({**model, "tokenizer_name_or_path": str(folder)}), key, "has no tokenizer")
    check(faults_of({**model, "tokenizer_name_or_path": "./no"}), key, "there is no folder")
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    check(faults_of({**model, "tokenizer_name_or_path": str(file)}), key, "is a file")


def test_files_and_revisions_where_a_folder_is_meant(folder: Path, rows: Path) -> None:
    check(faults_of({"name_or_path": str(rows)}), "model.name_or_path", "is a file")


def test_a_folder_has_no_revisions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    model = {"name_or_path": "model", "revision": "main"}
    check(faults_of(model), "model.revision", "has no revisions")


def test_chat_templates(tmp_path: Path) -> None:
    model = {"name_or_path": DEMO_MODELS[0]}
    key = "model.chat_template"
    check(faults_of({**model, "chat_template": "no.jinja"}), key, "there is no file no.jinja")
    check(faults_of({**model, "chat_template": str(tmp_path)}), key, "is a folder")
    (tmp_path / "x.jinja").write_text("\n")
    check(faults_of({**model, "chat_template": str(tmp_path / "x.jinja")}), key, "is empty")


def test_data_files(tmp_path: Path, rows: Path) -> None:
    model, key = {"name_or_path": DEMO_MODELS[0]}, "data.train.0.path"
    check(faults_of(model, {"path": "no.jsonl"}), key, "there is no file", str(Path.cwd()))
    check(faults_of(model, {"path": "./no"}), key, "there is no file")
    check(faults_of(model, {"path": str(tmp_path), "split": "dev"}), key, "dev")
    (tmp_path / "nothing").mkdir()
    check(faults_of(model, {"path": str(tmp_path / "nothing")}), key, "nothing", ".jsonl")
    rows.write_text("")
    check(faults_of(model, {"path": str(rows)}), key, "is empty")
    (tmp_path / "rows.xlsx").write_text("a,b")
    check(faults_of(model, {"path": str(tmp_path / "rows.xlsx")}), key, "has the ending .xlsx")
    (tmp_path / "page.jsonl").write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    check(faults_of(model, {"path": str(tmp_path / "page.jsonl")}), key, "HTML")


@pytest.mark.parametrize("ending", FILE_ENDINGS)
@pytest.mark.parametrize("compression", ["", *COMPRESSED_ENDINGS])
def test_a_missing_file_is_not_looked_for_on_the_hub(ending: str, compression: str) -> None:
    path = f"owner/rows{ending}{compression}"
    faults = faults_of({"name_or_path": DEMO_MODELS[0]}, {"path": path})
    check(faults, "data.train.0.path", "there is no file", path)


def test_a_folder_and_a_pattern_of_files(tmp_path: Path, rows: Path) -> None:
    model = {"name_or_path": DEMO_MODELS[0]}
    assert faults_of(model, {"path": str(tmp_path)}) == []
    assert faults_of(model, {"path": str(tmp_path / "*.jsonl")}) == []
    check(faults_of(model, {"path": str(tmp_path / "*.csv")}), "data.train.0.path", "*.csv")


def test_a_file_that_cannot_be_read(rows: Path) -> None:
    faults = faults_of({"name_or_path": DEMO_MODELS[0]}, {"path": f"{rows}/below.jsonl"})
    check(faults, "data.train.0.path", "there is no file", "below.jsonl")


@pytest.mark.parametrize("name", ["x" * 300, "./" + "y" * 300, "~nobody-of-this-name/x"])
def test_names_that_the_system_refuses(name: str) -> None:
    faults = faults_of({"name_or_path": name}, {"path": name + ".jsonl"})
    assert [fault.path.split(".")[0] for fault in faults] == ["model", "data"]
    assert all("cannot be looked up" in str(fault) or "no file" in str(fault) for fault in faults)


def test_it_agrees_with_what_loads_the_model() -> None:
    from qlora_kit.model import demo, source

    assert DEMO_MODELS == (demo.DEMO_MODEL,)
    for name in ("a", "a/b", "a/b/c", "./a", "../a", "/a", "~/a", ".a/b", "a.gguf"):
        assert looks_local(name) == source.looks_local(name), name


def test_it_imports_no_torch() -> None:
    code = "import sys, qlora_kit.preflight; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_checkout_of_llama_cpp_that_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise told after the training."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    values = {
        "model": {"name_or_path": DEMO_MODELS[0]},
        "data": {"train": [{"path": "demo/commands"}], "held_out": 0.05},
        "export": {"to": ["gguf:Q8_0", "nf4", "ollama"]},
    }
    recipe = recipe_from_dict(values, "x")
    assert preflight(recipe) == []
    monkeypatch.setenv("QLORA_KIT_LLAMA_CPP", str(tmp_path / "gone"))
    faults = preflight(recipe)
    assert [fault.path for fault in faults] == ["export.to.0", "export.to.2"]
    assert "QLORA_KIT_LLAMA_CPP names" in str(faults[0])


@pytest.mark.parametrize(("method", "num_faults"), [("nf4", 0), ("int8", 1), ("int4-group", 1)])
def test_what_stores_the_integers(
    method: str, num_faults: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "model": {"name_or_path": DEMO_MODELS[0]},
        "quantization": {"load_in_4bit": False},
        "quantization_aware": {"method": method},
        "data": {"train": [{"path": "demo/commands"}]},
    }
    recipe = recipe_from_dict(values, "x")
    assert preflight(recipe) == []
    monkeypatch.setitem(extras.EXTRAS, "qat", ("no_such_module_here",))
    faults = preflight(recipe)
    assert len(faults) == num_faults
    for fault in faults:
        assert fault.path == "quantization_aware.method"
        assert "pip install 'qlora-kit[qat]'" in str(fault)
