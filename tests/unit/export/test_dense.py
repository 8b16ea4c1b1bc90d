"""Dense tensors are, bit for bit, what the loaded model computes with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.errors import ModelError
from qlora_kit.export.checkpoint import Checkpoint
from qlora_kit.export.dense import AsTrained, iterate_dense, loaded_dtype, stored_dtype
from qlora_kit.export.names import map_names
from qlora_kit.model.bits import quantized_bits
from qlora_kit.model.skeleton import Skeleton, build_skeleton, load_config
from qlora_kit.model.weight import dequantized_weight
from qlora_kit.recipe import QuantizationSpec

from .tiny_runs import CONFIGS, load, save_model

QUANTIZATIONS = {
    "nf4": QuantizationSpec(),
    "nf4-single": QuantizationSpec(double_quant=False),
    "fp4": QuantizationSpec(quant_type="fp4"),
    "bf16-storage": QuantizationSpec(quant_storage="bfloat16"),
    "int8": QuantizationSpec(load_in_4bit=False, load_in_8bit=True),
}


def read_dense(
    folder: Path, skeleton: Skeleton, as_trained: AsTrained | None
) -> dict[str, torch.Tensor]:
    """Parameter → value."""
    with Checkpoint(folder) as checkpoint:
        changed = () if as_trained is None else quantized_bits(skeleton, as_trained.quantization)
        names = map_names(skeleton, checkpoint.names(), changed)
        tensors = list(iterate_dense(checkpoint, names, skeleton, as_trained))
    return {str(one.parameter): one.value for one in tensors}


def require_equal_to_loaded(
    dense: dict[str, torch.Tensor], model: PreTrainedModel, skeleton: Skeleton
) -> int:
    """Compare every weight; returns how many were quantized ones."""
    num_quantized = 0
    for parameter, value in dense.items():
        name, _, kind = parameter.rpartition(".")
        module = model.get_submodule(name)
        loaded = getattr(module, kind).detach().float()
        if kind == "weight" and type(module.weight).__name__ in ("Params4bit", "Int8Params"):
            num_quantized += 1
            loaded = dequantized_weight(module)
            if isinstance(skeleton.model.get_submodule(name), Conv1D):
                loaded = loaded.T
        assert value.dtype == torch.float32
        assert torch.equal(value, loaded), parameter
    return num_quantized


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=QUANTIZATIONS.keys())
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_as_trained_equals_the_loaded_model(
    tmp_path: Path, kind: str, quantization: QuantizationSpec
) -> None:
    save_model(tmp_path, CONFIGS[kind]())
    base = load(tmp_path, quantization)
    dense = read_dense(tmp_path, base.skeleton, AsTrained(quantization, torch.float32))
    num_quantized = require_equal_to_loaded(dense, base.model, base.skeleton)
    assert num_quantized == {"llama": 14, "gpt2": 8, "qwen2": 14}[kind]


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16])
def test_weights_pass_through_the_dtype_they_are_loaded_in(
    tmp_path: Path, compute_dtype: torch.dtype
) -> None:
    """Rounding before quantizing moves block maxima, so it shows in every dequantized value."""
    save_model(tmp_path, CONFIGS["llama"]())
    quantization = QuantizationSpec()
    base = load(tmp_path, quantization, compute_dtype)
    dense = read_dense(tmp_path, base.skeleton, AsTrained(quantization, compute_dtype))
    require_equal_to_loaded(dense, base.model, base.skeleton)
    unrounded = read_dense(tmp_path, base.skeleton, AsTrained(quantization, torch.float32))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(dense[name], unrounded[name])
    norm = "model.norm.weight"
    assert torch.equal(dense[norm], unrounded[norm].to(compute_dtype).float())


def test_skipped_modules_are_not_quantized(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["llama"]())
    quantization = QuantizationSpec(skip_modules=("down_proj",))
    base = load(tmp_path, quantization)
    dense = read_dense(tmp_path, base.skeleton, AsTrained(quantization, torch.float32))
    assert require_equal_to_loaded(dense, base.model, base.skeleton) == 12


def test_without_settings_values_are_as_stored(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["gpt2"](), dtype=torch.bfloat16)
    skeleton = build_skeleton(load_config(tmp_path))
    dense = read_dense(tmp_path, skeleton, None)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(dense) == set(stored)
    assert all(torch.equal(dense[name], stored[name].float()) for name in stored)


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=QUANTIZATIONS.keys())
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stored_quantized_weights_are_read_as_they_are(
    tmp_path: Path, kind: str, quantization: QuantizationSpec
) -> None:
    save_model(tmp_path / "dense", CONFIGS[kind]())
    base = load(tmp_path / "dense", quantization)
    base.model.save_pretrained(tmp_path / "quantized", max_shard_size="20KB")
    skeleton = build_skeleton(load_config(tmp_path / "quantized"))
    for as_trained in (None, AsTrained(quantization, torch.float32)):
        dense = read_dense(tmp_path / "quantized", skeleton, as_trained)
        assert require_equal_to_loaded(dense, base.model, skeleton) in (14, 8)


def test_a_lost_part_of_a_quantized_weight_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "dense", CONFIGS["llama"]())
    load(tmp_path / "dense").model.save_pretrained(tmp_path / "quantized")
    path = tmp_path / "quantized" / "model.safetensors"
    tensors = load_file(path)
    lost = "model.layers.1.mlp.up_proj.weight.quant_map"
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    skeleton = build_skeleton(load_config(tmp_path / "quantized"))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight lacks a part"):
        read_dense(tmp_path / "quantized", skeleton, None)


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    model = save_model(tmp_path, CONFIGS["llama-tied"](), max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with Checkpoint(tmp_path) as checkpoint:
        for name in checkpoint.names():
            assert torch.equal(checkpoint.tensor(name), model.get_parameter(name))
            assert checkpoint.describe(name) == (model.get_parameter(name).shape, torch.float32)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["llama"]())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="truncated"), Checkpoint(tmp_path):
        pass


def test_a_dtype_that_is_not_read_is_refused(tmp_path: Path) -> None:
    weight = torch.zeros(4, dtype=torch.float8_e4m3fn)
    save_file({"x.weight": weight}, tmp_path / "model.safetensors")
    with (
        Checkpoint(tmp_path) as checkpoint,
        pytest.raises(ModelError, match="F8_E4M3, which is not read"),
    ):
        checkpoint.describe("x.weight")


def test_stored_dtype_is_that_of_most_numbers(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["llama"](), dtype=torch.bfloat16)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, path, metadata={"format": "pt"})
    skeleton = build_skeleton(load_config(tmp_path))
    with Checkpoint(tmp_path) as checkpoint:
        names = map_names(skeleton, checkpoint.names(), ())
        assert stored_dtype(checkpoint, names) == torch.bfloat16


def test_parameters_that_a_model_keeps_in_float32_are_not_rounded(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["llama"]())
    skeleton = build_skeleton(load_config(tmp_path))
    skeleton.model._keep_in_fp32_modules_strict = {"q_proj"}
    name = "model.layers.0.self_attn.{}_proj.weight"
    assert loaded_dtype(skeleton, name.format("q"), torch.bfloat16) == torch.float32
    assert loaded_dtype(skeleton, name.format("k"), torch.bfloat16) == torch.bfloat16
