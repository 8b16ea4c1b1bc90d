"""nf4, fp4 and llm-int8: what is on the disk is bitsandbytes', and comes back bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.errors import ModelError
from qlora_kit.model.blocks import by_formula, reads_right
from qlora_kit.model.shared import state_checksum
from qlora_kit.quantize import blocks
from qlora_kit.quantize.methods import resolve_method
from qlora_kit.quantize.options import parse_options

from .tiny_sources import (
    KINDS,
    MIXTURE,
    build,
    calibration,
    logits,
    made_by,
    reloaded,
    source_of,
)

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("llama") / "source", *KINDS["llama"])


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_stock_settings_make_what_stock_transformers_makes(
    name: str, llama: Path, tmp_path: Path
) -> None:
    made_by(name, source_of(llama), tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(
        llama,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_use_double_quant=True
        ),
    )
    assert state_checksum(reloaded(tmp_path / "out")) == state_checksum(stock)


@pytest.mark.parametrize("double_quant", ["true", "false"])
def test_blocks_of_another_size_come_back_bit_by_bit_in_stock_transformers(
    double_quant: str, llama: Path, tmp_path: Path
) -> None:
    options = ("block_size=32", f"double_quant={double_quant}", "quant_storage=bfloat16")
    made = made_by("nf4", source_of(llama), tmp_path / "out", *options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    module: Any = reloaded(tmp_path / "out").get_submodule(DOWN)
    weight = load_file(llama / "model.safetensors")[f"{DOWN}.weight"]
    packed, state = quantize_4bit(
        weight,
        blocksize=32,
        compress_statistics=double_quant == "true",
        quant_type="nf4",
        quant_storage=torch.bfloat16,
    )

    assert config["quant_method"] == "bitsandbytes"
    assert "block_size" not in config
    assert "stock" not in config
    assert config["llm_int8_skip_modules"] == ["lm_head"]
    assert module.weight.quant_state.blocksize == 32
    assert torch.equal(module.weight.data.view(torch.uint8), packed.view(torch.uint8))
    assert torch.equal(module.weight.quant_state.absmax, state.absmax)
    assert len(made.findings["weight_error"]["layers"]) == made.findings["num_layers"] == 14


def test_error_of_a_layer_is_that_of_the_packed_numbers(llama: Path, tmp_path: Path) -> None:
    made = made_by("nf4", source_of(llama), tmp_path / "out", "double_quant=false")
    module: Any = reloaded(tmp_path / "out").get_submodule(DOWN)
    weight = load_file(llama / "model.safetensors")[f"{DOWN}.weight"]
    image = by_formula(module.weight.data, module.weight.quant_state)

    error = made.findings["weight_error"]["layers"][DOWN]
    assert error == pytest.approx(float((weight - image).norm() / weight.norm()), rel=1e-4)
    assert error == pytest.approx(0.092, abs=0.004)  # of normal numbers in blocks of 64


def test_conv1d_is_measured_the_right_way_round(tmp_path: Path) -> None:
    folder = build(tmp_path / "source", *KINDS["gpt2: Conv1D"])
    errors = made_by("nf4", source_of(folder), tmp_path / "out").findings["weight_error"]
    assert max(errors["layers"].values()) < 0.11
    loss = logits(reloaded(tmp_path / "out")) - logits(reloaded(folder))
    assert 0 < float(loss.norm()) < 0.5 * float(logits(reloaded(folder)).norm())


def test_skipped_layers_stay_beside_the_head(llama: Path, tmp_path: Path) -> None:
    made = made_by("nf4", source_of(llama), tmp_path / "out", "skip_modules=[o_proj]")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    was = load_file(llama / "model.safetensors")
    for name in ("model.layers.1.self_attn.o_proj.weight", "lm_head.weight"):
        assert torch.equal(stored[name], was[name])
    assert made.findings["num_layers"] == 12


def test_blocks_that_this_machine_reads_wrongly_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes on AVX-512 mixes up the scales of blocks that cross rows; elsewhere not."""
    monkeypatch.setattr(blocks, "reads_right", lambda *asked: False)
    source = source_of(llama)
    with pytest.raises(ModelError, match=r"64 inputs, which is no whole .*take block_size=64"):
        made_by("nf4", source, tmp_path / "out", "block_size=128")
    monkeypatch.setattr(blocks, "reads_right", lambda *asked: True)
    made_by("nf4", source, tmp_path / "out", "block_size=128", "double_quant=false")


def test_whole_blocks_are_read_right_everywhere() -> None:
    for num_in, size in ((64, 32), (128, 64), (256, 256)):
        assert reads_right(num_in, "nf4", size, "cpu")


def test_llm_int8_is_bitsandbytes_own(llama: Path, tmp_path: Path) -> None:
    made = made_by("llm-int8", source_of(llama), tmp_path / "out", "threshold=4.5")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    weight = load_file(llama / "model.safetensors")[f"{DOWN}.weight"]
    integers, scale, _ = int8_vectorwise_quant(weight.half())

    assert config["llm_int8_threshold"] == 4.5
    assert config["llm_int8_enable_fp32_cpu_offload"] is False
    assert torch.equal(stored[f"{DOWN}.weight"], integers)
    assert torch.equal(stored[f"{DOWN}.SCB"], scale)
    assert "outliers" not in made.findings
    assert "name --calibration" in made.notes[-1]


def test_outliers_are_the_features_that_bitsandbytes_takes_out(llama: Path, tmp_path: Path) -> None:
    text = calibration()
    found = made_by(
        "llm-int8", source_of(llama), tmp_path / "out", "threshold=2.5", calibration=text
    ).findings["outliers"]
    name = "model.layers.1.self_attn.q_proj"
    columns: set[int] = set()
    plain = reloaded(llama)
    plain.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: columns.update(
            int8_vectorwise_quant(inputs[0].view(-1, 64).half(), threshold=2.5)[2].tolist()
        )
    )
    for row in text.sequences:
        logits(plain, torch.tensor([row.input_ids]))

    assert 0 < len(columns) < 64
    assert set(found[name]["outlier_features"]) == columns
    assert found[name]["num_features"] == 64
    assert found[name]["largest"] >= 2.5


def test_offload_to_the_cpu_is_written_last(llama: Path, tmp_path: Path) -> None:
    """A machine without a GPU would take every layer for unquantized."""
    draft = tmp_path / "out"
    made = made_by("llm-int8", source_of(llama), draft, "fp32_cpu_offload=[model.layers.1]")
    before = json.loads((draft / "config.json").read_text())["quantization_config"]
    assert made.finish is not None
    made.finish(draft)
    after = json.loads((draft / "config.json").read_text())["quantization_config"]

    assert before["llm_int8_enable_fp32_cpu_offload"] is False
    assert after == {**before, "llm_int8_enable_fp32_cpu_offload": True}
    assert made.findings["num_layers"] == 7
    stored = load_file(draft / "model.safetensors")
    assert stored["model.layers.1.mlp.up_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize("name", ["nf4", "fp4", "llm-int8", "int8"])
def test_fused_experts_are_refused_before_the_work(name: str, tmp_path: Path) -> None:
    source = source_of(build(tmp_path / "source", *MIXTURE))
    with pytest.raises(ModelError, match=r"experts in fused tensors .* gguf:TYPE"):
        made_by(name, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("nf4", "qwen2: biases, tied"), ("llm-int8", "gpt2: Conv1D"), ("int8", "gemma3")],
)
def test_predicted_bytes_hold(name: str, kind: str, tmp_path: Path) -> None:
    source = source_of(build(tmp_path / "source", *KINDS[kind]))
    made_by(name, source, tmp_path / "out")
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    method = resolve_method(name)
    predicted = method.predict_bytes(source, parse_options(method, ()))
    assert 0.8 * predicted < written < predicted + 8192


def test_skips_that_skip_nothing_or_all_are_refused(llama: Path, tmp_path: Path) -> None:
    source = source_of(llama)
    with pytest.raises(ModelError, match="up_project is neither the start nor the end"):
        made_by("nf4", source, tmp_path / "out", "skip_modules=[up_project]")
    with pytest.raises(ModelError, match="covers every linear layer"):
        made_by("int8", source, tmp_path / "out", "skip_modules=[model.layers]")
