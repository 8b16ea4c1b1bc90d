"""LoftQ's start, held against a singular value decomposition of numpy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from conftest import build_tokenizer
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_kit.errors import AdapterError
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.base import Base
from qlora_kit.model.saved import load_adapter, save_adapter
from qlora_kit.recipe import LoraSpec, QuantizationSpec

from .zoo import DENSE, build, load, logits, train_a_step

Matrix = npt.NDArray[np.float32]

FOUR = QuantizationSpec()
EIGHT = QuantizationSpec(load_in_8bit=True)
LLAMA, GPT2 = "llama, untied", "gpt2: Conv1D, tied"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("llama"), *DENSE[LLAMA])


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("gpt2"), *DENSE[GPT2])


def spec_of(**lora: Any) -> LoraSpec:
    return LoraSpec(**{"r": 8, "alpha": 24, "init": "loftq", **lora})


def layers_of(model: torch.nn.Module) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def kept_weight(layer: Any) -> Matrix:
    """The quantized weight as upstream reads it, (out, in)."""
    base = layer.get_base_layer()
    if type(base.weight).__name__ == "Int8Params":
        scales = base.weight.SCB if base.state.SCB is None else base.state.SCB
        return int8_vectorwise_dequant(base.weight.data, scales).float().numpy()
    return dequantize_4bit(base.weight.data, base.weight.quant_state).float().numpy()


def update(layer: Any, scaling: float) -> Matrix:
    a, b = (pair["default"].weight.detach().numpy() for pair in (layer.lora_A, layer.lora_B))
    return np.float32(scaling) * (b @ a)


def frobenius(matrix: Matrix) -> float:
    return float(np.linalg.norm(matrix))


def everything_frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        found[name] = value.detach().clone()
        state = getattr(value, "quant_state", None)
        if state is not None:
            found[f"{name}.absmax"] = state.absmax.clone()
    return found


def attach(folder: Path, lora: LoraSpec, quantization: QuantizationSpec = FOUR) -> tuple[Base, Any]:
    base = load(folder, quantization, lora=lora)
    return base, attach_adapter(base, lora, 0).model


class TestTheFit:
    @pytest.mark.parametrize("quantization", [FOUR, EIGHT], ids=["4", "8"])
    @pytest.mark.parametrize(
        ("lora", "scalings"),
        [
            ({}, {"": 3.0}),
            ({"use_rslora": True}, {"": 24 / 8**0.5}),
            (
                {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 4}},
                {"up_proj": 12.0, "q_proj": 0.5, "": 3.0},
            ),
        ],
        ids=["plain", "rslora", "patterns"],
    )
    def test_is_the_best_of_its_rank(
        self,
        llama: Path,
        quantization: QuantizationSpec,
        lora: dict[str, Any],
        scalings: dict[str, float],
    ) -> None:
        """What is left of W - Q is its smaller singular values (Eckart and Young, 1936)."""
        _, model = attach(llama, spec_of(**lora), quantization)
        stored = load_file(llama / "model.safetensors")
        layers = layers_of(model)
        assert len(layers) == 14
        for name, layer in layers.items():
            (scaling,) = [v for kind, v in scalings.items() if name.endswith(kind)][:1]
            error = stored[f"{name}.weight"].numpy() - kept_weight(layer)
            left = frobenius(error - update(layer, scaling))
            values = np.linalg.svd(error.astype(np.float64), compute_uv=False)
            rank = 2 if lora.get("rank_pattern") and name.endswith("up_proj") else 8
            best = float(np.sqrt((values[rank:] ** 2).sum()))
            assert left < 0.97 * frobenius(error), name
            assert left == pytest.approx(best, rel=1e-3), name

    def test_of_conv1d_whose_weights_are_stored_turned(self, gpt2: Path) -> None:
        _, model = attach(gpt2, spec_of())
        stored = load_file(gpt2 / "model.safetensors")
        layers = layers_of(model)
        assert len(layers) == 8
        square = [name for name in layers if stored[f"{name}.weight"].shape == (64, 64)]
        assert square, "where a turned weight would pass unnoticed"
        for name, layer in layers.items():
            error = stored[f"{name}.weight"].T.numpy() - kept_weight(layer)
            values = np.linalg.svd(error.astype(np.float64), compute_uv=False)
            left = frobenius(error - update(layer, 3.0))
            assert left == pytest.approx(float(np.sqrt((values[8:] ** 2).sum())), rel=1e-3), name

    def test_brings_the_logits_closer_to_the_unquantized_model_s(self, llama: Path) -> None:
        exact = logits(load(llama, QuantizationSpec(load_in_4bit=False)).model)
        quantized = (logits(load(llama).model) - exact).norm()
        started = (logits(attach(llama, spec_of(r=24))[1]) - exact).norm()
        assert started < 0.75 * quantized

    def test_shares_the_singular_values_between_a_and_b(self, llama: Path) -> None:
        """Else one of them would start with hardly a gradient."""
        _, model = attach(llama, spec_of())
        for layer in layers_of(model).values():
            a, b = (pair["default"].weight.detach() for pair in (layer.lora_A, layer.lora_B))
            torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-3, atol=1e-6)

    def test_of_a_rank_beyond_the_matrix_is_exact_and_trains(self, llama: Path) -> None:
        """k_proj has 32 outputs."""
        _, model = attach(llama, spec_of(r=40, target_modules=("k_proj",)))
        stored = load_file(llama / "model.safetensors")
        for name, layer in layers_of(model).items():
            error = stored[f"{name}.weight"].numpy() - kept_weight(layer)
            assert frobenius(error - update(layer, 24 / 40)) < 1e-4 * frobenius(error)
            assert layer.lora_A["default"].weight[32:].any(), "no gradient would reach B there"
            assert not layer.lora_B["default"].weight[:, 32:].any()
        assert train_a_step(model, 0.05) > train_a_step(model, 0.05)


class TestTheBase:
    @pytest.mark.parametrize("quantization", [FOUR, EIGHT], ids=["4", "8"])
    def test_stays_as_it_was(self, llama: Path, quantization: QuantizationSpec) -> None:
        """So that the adapter is one for the plain base; OLoRA, for one, requantizes it."""
        spec = spec_of()
        base = load(llama, quantization, lora=spec)
        before = everything_frozen(base.model)
        start = logits(base.model)
        model = attach_adapter(base, spec, 0).model
        after = everything_frozen(model)
        assert after.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in after.items())
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), start, rtol=0, atol=0)

    def test_takes_the_adapter_from_the_disk(self, llama: Path, tmp_path: Path) -> None:
        base, model = attach(llama, spec_of())
        tuned = logits(model)
        save_adapter(model, base, FOUR, "0" * 64, tmp_path / "adapter")
        again = load(llama, FOUR, adapter=tmp_path / "adapter")
        back, findings = load_adapter(again, FOUR, tmp_path / "adapter")
        assert findings == []
        torch.testing.assert_close(logits(back), tuned, rtol=0, atol=0)

    def test_where_it_is_not_quantized_the_start_is_the_plain_one(self, llama: Path) -> None:
        quantization = QuantizationSpec(skip_modules=("up_proj",))
        _, model = attach(llama, spec_of(target_modules=("up_proj", "q_proj")), quantization)
        for name, layer in layers_of(model).items():
            assert bool(layer.lora_B["default"].weight.any()) == name.endswith("q_proj"), name
            assert layer.lora_A["default"].weight.any(), name


class TestTheWeightsFromBefore:
    @staticmethod
    def tensors(model: torch.nn.Module) -> list[torch.Tensor]:
        return [value.detach() for value in model.parameters() if value.requires_grad]

    def assert_same(self, one: torch.nn.Module, other: torch.nn.Module) -> None:
        for found, wanted in zip(self.tensors(one), self.tensors(other), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)

    def test_may_lie_in_shards(self, llama: Path, tmp_path: Path) -> None:
        build_tokenizer(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(llama)
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        self.assert_same(attach(tmp_path, spec_of())[1], attach(llama, spec_of())[1])

    @pytest.mark.parametrize("pickled", [False, True])
    def test_may_be_named_as_they_once_were(
        self, gpt2: Path, tmp_path: Path, pickled: bool
    ) -> None:
        """GPT-2 on the hub has no `transformer.` before its names."""
        build_tokenizer(tmp_path)
        (tmp_path / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
        values = load_file(gpt2 / "model.safetensors")
        short = {name.removeprefix("transformer."): value for name, value in values.items()}
        assert short.keys() != values.keys()
        if pickled:
            torch.save(short, tmp_path / "pytorch_model.bin")
        else:
            save_file(short, tmp_path / "model.safetensors", {"format": "pt"})
        base = load(tmp_path, FOUR, lora=spec_of(), allow_pickle=pickled)
        model = attach_adapter(base, spec_of(), 0).model
        self.assert_same(model, attach(gpt2, spec_of())[1])

    @pytest.mark.parametrize(
        ("tensor", "words"),
        [
            (None, r"has none for model\.layers\.1\.mlp\.up_proj\.weight; use init: default"),
            (
                torch.zeros(128, 64, dtype=torch.int8),
                r"up_proj\.weight.*as torch\.int8 \(128, 64\)",
            ),
            (torch.zeros(4096, 1), r"up_proj\.weight.*holds it as torch\.float32 \(4096, 1\)"),
        ],
        ids=["gone", "whole numbers", "packed"],
    )
    def test_must_be_there(
        self, llama: Path, tmp_path: Path, tensor: torch.Tensor | None, words: str
    ) -> None:
        folder = build(tmp_path, *DENSE[LLAMA])
        base = load(folder)
        values = load_file(folder / "model.safetensors")
        del values["model.layers.1.mlp.up_proj.weight"]
        if tensor is not None:
            values["model.layers.1.mlp.up_proj.weight"] = tensor
        save_file(values, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(AdapterError, match=words):
            attach_adapter(base, spec_of(), 0)
