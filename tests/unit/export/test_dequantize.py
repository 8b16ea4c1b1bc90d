"""A quantized checkpoint becomes the dense one that it computes with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.artifact.record import verify_artifact
from qlora_kit.artifact.verify import verify
from qlora_kit.environment import probe_hardware
from qlora_kit.errors import ModelError, RunError
from qlora_kit.export.dequantize import DequantizeResult, dequantize_checkpoint
from qlora_kit.recipe import QuantizationSpec

from .tiny_runs import CONFIGS, load, reload_logits, save_fused_model, save_model, some_ids

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

EIGHT_BIT = QuantizationSpec(load_in_4bit=False, load_in_8bit=True)


def quantize(tmp_path: Path, kind: str, quantization: QuantizationSpec, **options: object) -> Path:
    """A checkpoint that transformers saved quantized."""
    save_model(tmp_path / "dense", CONFIGS[kind]())
    base = load(tmp_path / "dense", quantization)
    base.model.save_pretrained(tmp_path / "quantized", **options)
    base.tokenizer.save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


def dequantize(folder: Path, **options: object) -> DequantizeResult:
    return dequantize_checkpoint(folder, folder.with_name("out"), probe_hardware(), **options)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize(
    "quantization", [QuantizationSpec(), QuantizationSpec(quant_type="fp4", double_quant=False)]
)
def test_4_bit_logits_are_equal(tmp_path: Path, kind: str, quantization: QuantizationSpec) -> None:
    folder = quantize(tmp_path, kind, quantization, max_shard_size="40KB")
    result = dequantize(folder, max_shard_bytes=50_000)
    assert result.passed
    assert (result.num_bits, result.dtype) == (4, "float32")
    assert result.divergence is not None
    assert result.divergence.kl_mean < 1e-9
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["divergence"]["kl_mean"] == result.divergence.kl_mean
    assert (certificate["passed"], certificate["source"]["num_bits"]) == (True, 4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# quantized, dequantized" in card
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")' in card
    assert verify_artifact(tmp_path / "out") == ()
    ids = some_ids()
    assert (reload_logits(tmp_path / "out", ids) - reload_logits(folder, ids)).abs().max() < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("4bit" in type(module).__name__ for module in model.modules())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_8_bit(tmp_path: Path, kind: str) -> None:
    folder = quantize(tmp_path, kind, EIGHT_BIT)
    result = dequantize(folder, dtype="float32")
    assert result.num_bits == 8
    assert result.passed
    assert result.divergence is not None
    assert 0 < result.divergence.kl_mean < 1e-3, "activations are rounded on one side only"
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(value, dense[name], rtol=0, atol=5e-3)


def test_the_dtype_is_what_was_asked(tmp_path: Path) -> None:
    folder = quantize(tmp_path, "llama", QuantizationSpec())
    result = dequantize(folder, dtype="bfloat16", compare=False)
    assert result.dtype == "bfloat16"
    assert result.divergence is None
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    found = verify(tmp_path / "out")
    assert found.holds
    assert [(link.role, link.kind) for link in found.links] == [
        ("itself", "dequantized"),
        ("base", "base"),
    ]


def test_a_checkpoint_that_is_fused_on_loading_is_refused(tmp_path: Path) -> None:
    """transformers cannot read back what it saves of such a model in 4 bits."""
    save_fused_model(tmp_path / "dense")
    load(tmp_path / "dense").model.save_pretrained(tmp_path / "quantized")
    with pytest.raises(ModelError):
        dequantize(tmp_path / "quantized")
    assert not (tmp_path / "out").exists()


def test_what_is_not_quantized_by_bitsandbytes_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "dense", CONFIGS["llama"]())
    with pytest.raises(ModelError, match="is not quantized"):
        dequantize(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantized with gptq"):
        dequantize(tmp_path / "dense")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="exists already"):
        dequantize(tmp_path / "quantized")


def test_a_wrong_result_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison would notice weights that are slightly off."""
    from qlora_kit.export import dequantize as module

    honest = module.round_to

    def wrong(value: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
        return honest(value * 1.3 if "down_proj" in name else value, dtype, name)

    monkeypatch.setattr(module, "round_to", wrong)
    result = dequantize(quantize(tmp_path, "llama", QuantizationSpec()))
    assert result.divergence is not None
    assert not result.passed
