"""What a run stands for when it is quantized: its merge into the original weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_kit.artifact.record import read_record
from qlora_kit.export.sixteen_bit import sixteen_bit
from qlora_kit.quantize.held_out import Named
from qlora_kit.quantize.quantize import Request, quantize
from qlora_kit.recipe import ExportSpec, LoraSpec, ModelSpec, save_recipe
from qlora_kit.report.reporter import SILENT, Reporter

from .test_merge_run import TinyRun, make_run
from .tiny_runs import reload_logits, some_ids


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("tiny"))


def request_for(tiny: TinyRun, out: Path) -> Request:
    return Request(ModelSpec(name_or_path=str(tiny.run.folder)), "nf4", out)


def test_a_run_is_its_adapter_on_the_original_weights(tiny: TinyRun, tmp_path: Path) -> None:
    with sixteen_bit(request_for(tiny, tmp_path / "out"), SILENT) as resolved:
        folder = Path(resolved.model.name_or_path)
        base = AutoModelForCausalLM.from_pretrained(tiny.tuned.base.source.folder)
        tuned = PeftModel.from_pretrained(base, tiny.run.adapter).eval()
        with torch.no_grad():
            wanted = tuned(input_ids=some_ids()).logits
        assert torch.allclose(reload_logits(folder, some_ids()), wanted, atol=1e-4)
        assert resolved.texts == Named(None, str(tiny.run.recipe))
        assert resolved.note.endswith("merged into its 16-bit base")
        assert not resolved.keeps_source
    assert not folder.exists()
    assert list(tmp_path.iterdir()) == []


class Tables(Reporter):
    def __init__(self) -> None:
        self.titles: list[str] = []
        self.cells: list[str] = []

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], **_: Any
    ) -> None:
        self.titles.append(title)
        self.cells += [cell for row in rows for cell in row]


def test_the_merge_on_the_way_has_no_budget(tiny: TinyRun, tmp_path: Path) -> None:
    """It is for what is kept; the quantized model has one of its own."""
    told = Tables()
    with sixteen_bit(request_for(tiny, tmp_path / "out"), told):
        pass
    (title,) = told.titles
    assert "before it is quantized" in title
    assert not [cell for cell in told.cells if "budget" in cell]


def test_what_is_made_of_a_run_names_its_adapter(tiny: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with sixteen_bit(request_for(tiny, out), SILENT) as resolved:
        certificate = quantize(resolved)
    assert certificate["source"]["note"].endswith("merged into its 16-bit base")
    assert certificate["held_out"].endswith("recipe.yaml")
    assert read_record(out).made_from.parent is None
    assert (out / "model.safetensors").is_file()


@pytest.fixture
def merged(tmp_path: Path) -> TinyRun:
    """A run with a merge into its original weights."""
    run = make_run(tmp_path / "merged", base="original")
    run.merge()
    return run


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("merged anew")


def test_a_merge_that_an_export_has_left_is_used(
    merged: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_kit.export.sixteen_bit.merge_reopened", never)
    left = merged.run.folder / "merged-original"
    for folder in (merged.run.merged, left):
        if folder is left:
            merged.run.merged.rename(left)
        with sixteen_bit(request_for(merged, tmp_path / "out"), SILENT) as resolved:
            assert resolved.model.name_or_path == str(folder)
            assert resolved.keeps_source


def test_a_merge_of_an_adapter_that_was_trained_on_since_is_not(
    merged: TinyRun, tmp_path: Path
) -> None:
    before = make_run(tmp_path / "before", LoraSpec(r=2), base="original")
    before.merge()
    merged.run.merged.rename(tmp_path / "aside")
    before.run.merged.rename(merged.run.merged)
    with sixteen_bit(request_for(merged, tmp_path / "out"), SILENT) as resolved:
        assert resolved.model.name_or_path != str(merged.run.merged)
        assert not resolved.keeps_source


def test_the_runs_own_rows_come_first_whatever_calibrates(merged: TinyRun, tmp_path: Path) -> None:
    request = request_for(merged, tmp_path / "out")
    own, other = str(merged.run.recipe), str(tmp_path / "text.txt")
    named = {
        Named(other, None): Named(other, own),
        Named(other, other): Named(other, other),
        Named(None, other): Named(None, other),
    }
    for texts, wanted in named.items():
        with sixteen_bit(replace(request, texts=texts), SILENT) as resolved:
            assert resolved.texts == wanted
    at_adapter = ModelSpec(name_or_path=str(merged.run.adapter))
    with sixteen_bit(replace(request, model=at_adapter), SILENT) as resolved:
        assert resolved.texts == Named(None, own)


def test_of_a_run_without_any_it_is_asked_for_none(merged: TinyRun, tmp_path: Path) -> None:
    """It has lost them since it was merged."""
    data = merged.recipe.data.model_copy(update={"eval": ()})
    without = merged.recipe.model_copy(update={"data": data, "export": ExportSpec()})
    save_recipe(without, merged.run.recipe)
    with sixteen_bit(request_for(merged, tmp_path / "out"), SILENT) as resolved:
        assert resolved.texts == Named(None, None)


def test_a_model_is_what_it_is(tiny: TinyRun, tmp_path: Path) -> None:
    request = request_for(tiny, tmp_path / "out")
    plain = replace(request, model=ModelSpec(name_or_path=str(tiny.tuned.base.source.folder)))
    with sixteen_bit(plain, SILENT) as resolved:
        assert resolved is plain
