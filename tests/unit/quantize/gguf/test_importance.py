"""llama.cpp's importance matrix: what it holds, and what it changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import build_llama, build_tokenizer
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.environment import probe_hardware
from qlora_kit.errors import ModelError
from qlora_kit.quantize.gguf.importance import (
    Importance,
    measure_importance,
    write_importance,
)
from qlora_kit.quantize.gguf.importance_file import read_importance
from qlora_kit.quantize.gguf.quantizer import quantize_file
from qlora_kit.quantize.gguf.types import gguf_type
from qlora_kit.quantize.method import Calibration
from qlora_kit.quantize.methods import resolve_method
from qlora_kit.quantize.options import parse_options
from qlora_kit.quantize.source import open_source
from qlora_kit.recipe import ModelSpec
from qlora_kit.report.reporter import SILENT

if TYPE_CHECKING:
    from conftest import GgufFiles

    from qlora_kit.quantize.gguf.scripts import LlamaCpp

ROWS = ((5, 17, 301, 42, 8, 99), (7, 7, 120), tuple(range(30, 90)))


@pytest.fixture
def calibration() -> Calibration:
    sequences = tuple(TokenSequence(row, row, f"row {n}") for n, row in enumerate(ROWS))
    return Calibration(sequences, sum(map(len, ROWS)), "three rows")


@pytest.fixture
def importance(loud_llama: Path, calibration: Calibration) -> Importance:
    source = open_source(ModelSpec(name_or_path=str(loud_llama)), probe_hardware())
    return measure_importance(source, calibration, SILENT)


@torch.no_grad()
def test_it_is_the_mean_square_of_what_a_layer_is_given(
    importance: Importance, loud_llama: Path
) -> None:
    """Of the first layer that is the normalized embedding, here computed by itself."""
    model = AutoModelForCausalLM.from_pretrained(loud_llama, dtype=torch.float32)
    embedded = model.model.embed_tokens(torch.tensor([id_ for row in ROWS for id_ in row]))
    given = model.model.layers[0].input_layernorm(embedded)
    name = "model.layers.0.self_attn.q_proj"
    assert importance.counts[name] == sum(map(len, ROWS))
    assert torch.allclose(importance.sums[name].float(), given.square().sum(0), rtol=1e-5)
    assert {one.split(".")[-1] for one in importance.sums} >= {"down_proj", "o_proj", "lm_head"}


def test_llama_cpp_names_and_shapes(
    importance: Importance, made_gguf: GgufFiles, tmp_path: Path
) -> None:
    folder, made = made_gguf["F16"]
    found, total = write_importance(importance, folder / made.open, tmp_path / "matrix.gguf")
    assert (found, total) == (14, 14), "seven matrices in each of two layers"
    read = read_importance(tmp_path / "matrix.gguf")
    layer = "model.layers.1.mlp.down_proj"
    wanted = importance.sums[layer] / importance.counts[layer]
    assert np.allclose(read["blk.1.ffn_down.weight"], wanted.numpy(), rtol=1e-5)
    assert read["blk.1.ffn_down.weight"].shape == (256,)


def test_the_errors_that_count_are_smaller(
    importance: Importance, made_gguf: GgufFiles, llama_scripts: LlamaCpp, tmp_path: Path
) -> None:
    folder, made = made_gguf["F16"]
    between = folder / made.open
    write_importance(importance, between, tmp_path / "matrix.gguf")
    weights = read_importance(tmp_path / "matrix.gguf")
    kind, errors = gguf_type("Q4_0"), []
    exact = {str(one.name): one.data.astype(np.float32) for one in GGUFReader(between).tensors}
    for matrix in (None, tmp_path / "matrix.gguf"):
        target = tmp_path / f"{matrix is None}.gguf"
        quantize_file(llama_scripts, between, target, kind, 1, matrix)
        tensors = {str(one.name): one for one in GGUFReader(target).tensors}
        total = 0.0
        for name, weight in weights.items():
            held = dequantize(tensors[name].data, tensors[name].tensor_type)
            total += float((weight * (held - exact[name]) ** 2).sum())
        errors.append(total)
    assert errors[1] < 0.95 * errors[0]


def made_with(folder: Path, name: str, calibration: Calibration | None, draft: Path) -> Any:
    source = open_source(ModelSpec(name_or_path=str(folder)), probe_hardware())
    method = resolve_method(f"gguf:{name}")
    options = parse_options(method, ())
    return method.make(source, options, calibration, draft, SILENT)


@pytest.mark.usefixtures("llama_scripts")
def test_the_smallest_types_can_be_made_with_text(calibration: Calibration, tmp_path: Path) -> None:
    """Rows of 256, so that no tensor takes another type."""
    folder = build_llama(
        tmp_path / "model", hidden_size=256, intermediate_size=256, num_key_value_heads=4
    )
    draft = tmp_path / "draft"
    draft.mkdir()
    made = made_with(folder, "IQ2_XXS", calibration, draft)
    assert made.findings["tensors_weighed_by_text"] == 14
    assert made.findings["tensors_of_another_type"] == 0
    assert "weighed by calibration text in 14 of 14 matrices" in made.notes[0]
    assert {path.name for path in draft.iterdir() if path.suffix == ".gguf"} == {made.open}


@pytest.mark.usefixtures("llama_scripts")
def test_which_types_look_at_text() -> None:
    needs = {}
    for name in ("F16", "Q8_0", "Q4_K_M", "IQ2_XXS"):
        method = resolve_method(f"gguf:{name}")
        needs[name] = method.calibration(parse_options(method, ()))
    assert needs == {
        "F16": "none",
        "Q8_0": "none",
        "Q4_K_M": "optional",
        "IQ2_XXS": "required",
    }
    method = resolve_method("gguf:Q4_K_M")
    assert method.calibration(parse_options(method, ("importance=false",))) == "none"


@pytest.mark.usefixtures("llama_scripts")
def test_fused_experts_cannot_be_weighed(tmp_path: Path) -> None:
    """llama.cpp would end in the middle of the work, for want of their importance."""
    build_tokenizer(tmp_path)
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads, **experts)).save_pretrained(tmp_path)
    source = open_source(ModelSpec(name_or_path=str(tmp_path)), probe_hardware())
    method = resolve_method("gguf:IQ2_XXS")
    with pytest.raises(ModelError, match=r"fused experts .*experts\.gate_up_proj.* take Q2_K"):
        method.check(source, parse_options(method, ()))


def test_what_is_not_finite_is_told(
    loud_llama: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_kit.quantize.gguf import importance as module

    def broken(model: Any, layers: Any, sequences: Any, look: Any, reporter: Any) -> None:
        look(layers[0], torch.tensor([[1.0, float("inf")]]))

    monkeypatch.setattr(module, "observe", broken)
    source = open_source(ModelSpec(name_or_path=str(loud_llama)), probe_hardware())
    with pytest.raises(ModelError, match=r"q_proj of .* is not finite"):
        measure_importance(source, calibration, SILENT)
