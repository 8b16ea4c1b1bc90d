"""From an adapter to a certified folder: in memory, from a run, from an adapter alone."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.artifact.record import read_record
from qlora_kit.artifact.verify import verify
from qlora_kit.data.prepare import Part
from qlora_kit.environment import probe_hardware
from qlora_kit.errors import AdapterError, DataError, HardwareError
from qlora_kit.export import merge_run
from qlora_kit.export.merge_run import merge_after_training, merge_reopened
from qlora_kit.export.reopen import reopen_adapter
from qlora_kit.model.manifest import MANIFEST_FILE
from qlora_kit.recipe import (
    LoraSpec,
    MergeSpec,
    ModelSpec,
    save_recipe,
)
from qlora_kit.records import file_sha256

from .tiny_runs import CONFIGS, save_model
from .whole_runs import Heard, TinyRun, make_run

SCRIPT = Path(__file__).parents[3] / "scripts" / "merge_adapter.py"


def same_weights(one: Path, other: Path) -> bool:
    weights = (read_record(folder).files["model.safetensors"] for folder in (one, other))
    return len(set(weights)) == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, dict[str, Any], Heard]:
    tiny = make_run(tmp_path_factory.mktemp("finished"))
    heard = Heard()
    certificate = tiny.merge(heard)
    assert certificate is not None
    return tiny, certificate, heard


Finished = tuple[TinyRun, dict[str, Any], Heard]


def test_what_a_killed_attempt_has_merged_is_merged_again(tmp_path: Path) -> None:
    tiny = make_run(tmp_path, base="dequantized")
    tiny.run.merged.mkdir()
    (tiny.run.merged / "half.safetensors").touch()
    (tiny.run.folder / f".merged.{'0' * 32}.draft").mkdir()
    assert tiny.merge() is not None
    assert not (tiny.run.merged / "half.safetensors").exists()
    assert (tiny.run.merged / "certificate.json").is_file()
    assert not [path for path in tiny.run.folder.iterdir() if path.name.startswith(".")]


def test_the_certificate_says_what_was_measured(finished: Finished) -> None:
    tiny, certificate, heard = finished
    assert certificate["passed"]
    assert certificate["base"] == "dequantized", "the other one is over the budget"
    assert certificate["divergence"]["kl_mean"] < 1e-8
    assert certificate["divergence"]["top1_agreement"] == 1.0
    assert certificate["divergence"]["num_tokens"] == 6 * 4
    assert certificate["survival"]["min"] > 0.999
    assert certificate["reload_faults"] == []
    assert [one["base"] for one in certificate["candidates"]] == ["dequantized", "original"]
    assert not certificate["candidates"][1]["passed"]
    assert certificate["trained_on"]["quantization"]["quant_type"] == "nf4"
    adapter = tiny.run.adapter / "adapter_model.safetensors"
    assert certificate["adapter_sha256"] == file_sha256(adapter)
    stored = json.loads((tiny.run.merged / "certificate.json").read_text())
    assert stored == certificate
    (rows,) = heard.tables
    assert len(rows) == 3


def test_every_file_has_its_hash(finished: Finished) -> None:
    tiny, certificate, _ = finished
    record = read_record(tiny.run.merged)
    found = {path.name for path in tiny.run.merged.iterdir()} - {"artifact.json"}
    assert set(record.files) == found
    for name, file in record.files.items():
        assert file_sha256(tiny.run.merged / name) == file.sha256
    assert record.settings == {"base": "dequantized", "dtype": "float32"}
    origin = record.made_from
    assert origin.base is not None
    assert origin.adapter is not None
    assert origin.base.fingerprint == certificate["trained_on"]["fingerprint"]
    assert origin.base.name == str(tiny.run.folder.parent / "base")
    assert origin.adapter.sha256 == certificate["adapter_sha256"]
    assert origin.recipe_sha256 == certificate["recipe_sha256"]


def test_all_of_a_run_is_verified_and_a_change_to_any_of_it_is_named(tmp_path: Path) -> None:
    tiny = make_run(tmp_path, base="dequantized")
    tiny.merge()
    found = verify(tiny.run.folder)
    assert found.holds, [one.faults for one in found.links]
    assert [(one.role, one.kind) for one in found.links] == [
        ("itself", "adapter"),
        ("recipe", "recipe"),
        ("base", "base"),
        ("itself", "merged"),
    ]
    model = save_model(tmp_path / "base", CONFIGS["llama-tied"]())
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path / "base")
    faults = [(one.kind, fault) for one in verify(tiny.run.folder).links for fault in one.faults]
    (fault,) = faults
    assert fault[0] == "base"
    assert "its fingerprint is" in fault[1]


def test_the_loser_and_the_scratch_are_gone(finished: Finished) -> None:
    tiny, _, _ = finished
    assert sorted(path.name for path in tiny.run.folder.iterdir()) == [
        "adapter",
        "merged",
        "recipe.yaml",
    ]


def test_the_card_has_front_matter_figures_and_code_that_runs(
    finished: Finished, tmp_path: Path
) -> None:
    tiny, certificate, _ = finished
    text = (tiny.run.merged / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in front, "the hub has no such model"
    assert "trained on `base`" in text, "no path of this machine"
    assert front["library_name"] == "transformers"
    assert str(tiny.run.folder) not in text
    assert f"{certificate['divergence']['kl_mean']:.3g}" in text
    code = text.split("```python\n")[1].split("```")[0]
    script = tmp_path / "card.py"
    script.write_text(code.replace("path/to/this/folder", str(tiny.run.merged)))
    values = runpy.run_path(str(script))
    assert values["model"].get_input_embeddings().weight is (
        values["model"].get_output_embeddings().weight
    )


def test_a_run_is_merged_again_from_the_disk(finished: Finished, tmp_path: Path) -> None:
    tiny, certificate, _ = finished
    reopened = reopen_adapter(tiny.run.folder, probe_hardware())
    again = merge_reopened(reopened, tmp_path / "again", MergeSpec(), probe_hardware())
    assert again["divergence"] == certificate["divergence"]
    assert again["recipe_sha256"] == certificate["recipe_sha256"]
    assert same_weights(tmp_path / "again", tiny.run.merged)


def test_an_adapter_alone_needs_rows(finished: Finished, tmp_path: Path) -> None:
    tiny, certificate, _ = finished
    alone = tmp_path / "alone"
    shutil.copytree(tiny.run.adapter, alone)
    hardware = probe_hardware()
    with pytest.raises(DataError, match="--data"):
        reopen_adapter(alone, hardware)
    rows = tiny.run.folder.parent / "rows.jsonl"
    reopened = reopen_adapter(alone, hardware, data=rows)
    again = merge_reopened(reopened, tmp_path / "out", MergeSpec(base="dequantized"), hardware)
    assert again["divergence"] == certificate["divergence"]
    assert len(again["candidates"]) == 1


def test_an_adapter_without_a_manifest_needs_force(finished: Finished, tmp_path: Path) -> None:
    tiny, _, _ = finished
    alone = tmp_path / "alone"
    shutil.copytree(tiny.run.adapter, alone)
    (alone / MANIFEST_FILE).unlink()
    rows = tiny.run.folder.parent / "rows.jsonl"
    with pytest.raises(AdapterError, match="nobody knows which base"):
        reopen_adapter(alone, probe_hardware(), data=rows)
    heard = Heard()
    reopened = reopen_adapter(alone, probe_hardware(), data=rows, force=True, reporter=heard)
    assert any("nothing of its base is known" in line for line in heard.warnings)
    options = MergeSpec(base="dequantized")
    certificate = merge_reopened(reopened, tmp_path / "out", options, probe_hardware())
    assert certificate["divergence"]["kl_mean"] < 1e-8
    assert certificate["trained_on"]["fingerprint"] is None


def test_an_adapter_of_another_base_needs_force(finished: Finished, tmp_path: Path) -> None:
    tiny, _, _ = finished
    folder = tmp_path / "run"
    shutil.copytree(tiny.run.folder, folder, ignore=shutil.ignore_patterns("merged"))
    model = save_model(tmp_path / "other", CONFIGS["llama-tied"]())
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path / "other")
    recipe = tiny.recipe.model_copy(
        update={"model": ModelSpec(name_or_path=str(tmp_path / "other"))}
    )
    save_recipe(recipe, folder / "recipe.yaml")
    with pytest.raises(AdapterError, match="does not belong to this base"):
        reopen_adapter(folder, probe_hardware())
    heard = Heard()
    assert reopen_adapter(folder, probe_hardware(), force=True, reporter=heard).held_out
    assert any("forced onto another base: the weights" in line for line in heard.warnings)


def test_new_tokens_come_back_from_the_disk(tmp_path: Path) -> None:
    tiny = make_run(tmp_path, LoraSpec(r=4, new_tokens=("<a>", "<b>")))
    certificate = tiny.merge()
    reopened = reopen_adapter(tiny.run.folder, probe_hardware())
    again = merge_reopened(reopened, tmp_path / "again", MergeSpec(), probe_hardware())
    assert certificate is not None
    assert again["passed"]
    assert same_weights(tmp_path / "again", tiny.run.merged)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "again")) == 130


def test_a_recipe_that_does_not_ask_is_not_merged(tmp_path: Path) -> None:
    tiny = make_run(tmp_path)
    recipe = tiny.recipe.model_copy(update={"export": type(tiny.recipe.export)()})
    assert (
        merge_after_training(
            tiny.tuned.model, tiny.tuned.base, tiny.held_out, recipe, tiny.run, probe_hardware()
        )
        is None
    )
    assert not tiny.run.merged.exists()


def test_a_miss_is_certified_as_a_miss(tmp_path: Path) -> None:
    tiny = make_run(tmp_path, base="original")
    certificate = tiny.merge()
    assert certificate is not None
    assert not certificate["passed"]
    assert (tiny.run.merged / "certificate.json").is_file()
    assert "**not within**" in (tiny.run.merged / "README.md").read_text()


def test_without_held_out_rows_there_is_no_certificate(tmp_path: Path) -> None:
    tiny = make_run(tmp_path)
    with pytest.raises(DataError, match="there are none"):
        merge_after_training(
            tiny.tuned.model,
            tiny.tuned.base,
            Part.empty(),
            tiny.recipe,
            tiny.run,
            probe_hardware(),
        )
    assert not tiny.run.merged.exists()


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_run(tmp_path)
    before = sorted(path.name for path in tiny.run.folder.iterdir())

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for name in ("measure", "certify"):
        with monkeypatch.context() as patch:
            patch.setattr(merge_run, name, fail)
            with pytest.raises(KeyboardInterrupt):
                tiny.merge()
        assert sorted(path.name for path in tiny.run.folder.iterdir()) == before

    def no_room(*_: Any) -> None:
        raise HardwareError("no room")

    monkeypatch.setattr(merge_run, "require_room", no_room)
    with pytest.raises(HardwareError):
        tiny.merge()
    assert sorted(path.name for path in tiny.run.folder.iterdir()) == before


@pytest.fixture
def run_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out + captured.err

    return run


def test_the_script(
    finished: Finished, tmp_path: Path, run_script: Callable[..., tuple[int, str]]
) -> None:
    tiny, _, _ = finished
    code, shown = run_script("--adapter", tiny.run.folder, "--out", tmp_path / "out")
    assert code == 0
    assert "is within the budget of KL 0.001" in shown
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    code, shown = run_script("--adapter", tiny.run.folder, "--out", tmp_path / "out")
    assert code == 1
    assert "exists already" in shown
    code, shown = run_script(
        "--adapter", tiny.run.folder, "--out", tmp_path / "far", "--base", "original"
    )
    assert code == 1
    assert "is not within the budget" in shown
    for number in ("0", "inf"):
        code, shown = run_script(
            "--adapter", tiny.run.folder, "--out", tmp_path / "x", "--max-kl", number
        )
        assert code == 2
        assert f"must be greater than 0 and finite, got {number}" in shown
