"""int8 models through transformers: what is saved comes back, in every dtype and architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora_kit.errors import ModelError
from qlora_kit.model.quantized import count_quantized
from qlora_kit.quantize.int8 import Int8Config, Int8Linear
from qlora_kit.quantize.int8.observe import LargestSeen, observe
from qlora_kit.report.reporter import SILENT
from qlora_kit.runtime.footprint import parameters_by_form

from .tiny_sources import (
    KINDS,
    build,
    calibration,
    logits,
    made_by,
    reloaded,
    sequences,
    some_ids,
    source_of,
)

KIND_NAMES = tuple(KINDS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {name: build(root / str(n), *KINDS[name]) for n, name in enumerate(KINDS)}


def plain_images(folder: Path, names: set[str], group_size: int | None = None) -> nn.Module:
    """The model with every quantized weight replaced by what int8 makes of it, in plain torch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name in names:
        module = model.get_submodule(name)
        turned = isinstance(module, Conv1D)
        weight = module.weight.data.T if turned else module.weight.data
        parts = weight.reshape(len(weight), -1, group_size or weight.shape[1])
        scale = parts.abs().amax(dim=2, keepdim=True) / 127
        image = ((parts / scale).round() * scale).view(weight.shape)
        module.weight.data = (image.T if turned else image).contiguous()
    return model


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_saved_and_loaded_again_it_computes_what_plain_torch_does(
    kind: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    made_by("int8", source_of(sources[kind]), tmp_path / "out")
    model = reloaded(tmp_path / "out")
    layers = {name for name, one in model.named_modules() if isinstance(one, Int8Linear)}

    plain = plain_images(sources[kind], layers)
    assert len(layers) == (8 if kind.startswith("gpt2") else 14)
    assert torch.allclose(logits(model), logits(plain), atol=2e-5)
    head = model.get_output_embeddings()
    assert not isinstance(head, Int8Linear)
    assert (head.weight is model.get_input_embeddings().weight) == (kind != "llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_kept_has_the_dtype_of_the_source(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = build(tmp_path / "source", *KINDS["qwen2: biases, tied"], dtype=dtype)
    made_by("int8", source_of(folder), tmp_path / "out", "granularity=group", "group_size=32")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    was = load_file(folder / "model.safetensors")
    layer = "model.layers.0.self_attn.q_proj"

    assert stored[f"{layer}.weight"].dtype == torch.int8
    assert stored[f"{layer}.weight_scale"].dtype == torch.float32
    assert stored[f"{layer}.weight_scale"].shape == (64, 2)
    assert torch.equal(stored[f"{layer}.bias"], was[f"{layer}.bias"])
    assert torch.equal(stored["model.embed_tokens.weight"], was["model.embed_tokens.weight"])
    assert "lm_head.weight" not in stored
    model = reloaded(tmp_path / "out", dtype)
    assert model.get_submodule(layer).weight_scale.dtype == torch.float32
    assert logits(model).dtype == dtype
    again = tmp_path / "again"
    model.save_pretrained(again)
    for name, tensor in load_file(again / "model.safetensors").items():
        assert torch.equal(tensor, stored[name]), name


def test_from_pretrained_quantizes_while_it_loads(sources: dict[str, Path], tmp_path: Path) -> None:
    """The format is transformers' as much as the kit's: no verb is needed."""
    folder = sources["gpt2: Conv1D"]
    made_by("int8", source_of(folder), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config()).eval()
    assert torch.equal(logits(model), logits(reloaded(tmp_path / "out")))
    with pytest.raises(ValueError, match="need calibration text"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=Int8Config(activations="static")
        )


def test_dynamic_activations_round_each_token(sources: dict[str, Path], tmp_path: Path) -> None:
    made_by("int8", source_of(sources["llama"]), tmp_path / "out", "activations=dynamic")
    layer = reloaded(tmp_path / "out").get_submodule("model.layers.0.mlp.down_proj")
    inputs = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(3))

    for token, output in zip(inputs.view(-1, 128), layer(inputs).view(-1, 64), strict=True):
        scale = token.abs().max() / 127
        rounded = (token / scale).round().long() @ layer.weight.long().T
        wanted = rounded * scale * layer.weight_scale.flatten()
        assert torch.allclose(output, wanted, rtol=1e-5, atol=1e-6)


def test_static_scales_are_the_largest_number_of_the_calibration_text(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    folder, text = sources["qwen2: biases, tied"], calibration()
    found = made_by(
        "int8", source_of(folder), tmp_path / "out", "activations=static", calibration=text
    ).findings["input_scales"]
    name = "model.layers.1.self_attn.o_proj"
    seen: list[float] = []
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: seen.append(float(inputs[0].abs().max()))
    )
    for row in text.sequences:
        logits(plain, torch.tensor([row.input_ids]))

    assert found[name] == pytest.approx(max(seen) / 127)
    layer = reloaded(tmp_path / "out").get_submodule(name)
    assert float(layer.input_scale) == pytest.approx(found[name])
    inputs = torch.linspace(-max(seen), max(seen), 64).view(1, 64)
    rounded = (inputs / layer.input_scale).round().clamp(-127, 127).long() @ layer.weight.long().T
    wanted = rounded * layer.input_scale * layer.weight_scale.flatten()
    assert torch.allclose(layer(inputs), wanted, rtol=1e-5, atol=1e-6)


def test_moving_average_forgets_a_single_outlier() -> None:
    largest, average = LargestSeen(), LargestSeen(decay=0.5)
    for value in (1.0, 9.0, 1.0):
        for observer in (largest, average):
            observer("a", torch.tensor([[value, -0.5]]))
    assert largest.largest["a"] == 9.0
    assert average.largest["a"] == 0.5 * (0.5 * 1 + 0.5 * 9) + 0.5 * 1


def test_observing_leaves_no_trace(sources: dict[str, Path]) -> None:
    model = reloaded(sources["llama"])
    observe(model, ["model.layers.0.mlp.up_proj"], sequences(1), LargestSeen(), SILENT)
    assert not model.get_submodule("model.layers.0.mlp.up_proj")._forward_pre_hooks


def test_config_says_how_it_was_made(sources: dict[str, Path], tmp_path: Path) -> None:
    made_by("int8", source_of(sources["llama"]), tmp_path / "out", "skip_modules=[o_proj]")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "qlora-kit-int8",
        "granularity": "channel",
        "group_size": 128,
        "activations": "none",
        "skip_modules": ["lm_head", "o_proj"],
    }
    model = reloaded(tmp_path / "out")
    assert type(model.get_submodule("model.layers.0.self_attn.o_proj")) is nn.Linear
    forms = parameters_by_form(model)
    assert forms["int8"] == 2 * (64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert sum(forms.values()) == source_of(sources["llama"]).num_parameters
    assert count_quantized(model).weight_bytes > forms["int8"]


def test_groups_that_do_not_divide_are_refused_before_the_work(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = source_of(sources["llama"])
    with pytest.raises(ModelError, match=r"group_size=48 does not divide the 64 .* divisor of 64"):
        made_by("int8", source, tmp_path / "out", "granularity=group", "group_size=48")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="do not divide"):
        AutoModelForCausalLM.from_pretrained(
            sources["llama"],
            quantization_config=Int8Config(granularity="group", group_size=48),
        )


def test_it_is_near_the_source_and_group_scales_are_nearer(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    wanted = logits(reloaded(sources["gemma3"]), some_ids(4, 30))
    errors = []
    for number, options in enumerate(
        (["granularity=tensor"], ["granularity=group", "group_size=16"])
    ):
        out = tmp_path / str(number)
        made_by("int8", source_of(sources["gemma3"]), out, *options)
        errors.append(float((logits(reloaded(out), some_ids(4, 30)) - wanted).norm()))
    assert 0 < errors[1] < errors[0] < 0.05 * float(wanted.norm())
