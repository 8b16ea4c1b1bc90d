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
from qlora_kit.recipe import ModelSpec
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


def test_a_model_is_what_it_is(tiny: TinyRun, tmp_path: Path) -> None:
    request = request_for(tiny, tmp_path / "out")
    plain = replace(request, model=ModelSpec(name_or_path=str(tiny.tuned.base.source.folder)))
    with sixteen_bit(plain, SILENT) as resolved:
        assert resolved is plain
