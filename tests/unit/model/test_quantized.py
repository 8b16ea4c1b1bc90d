"""What share of a model is really quantized, and what passes for quantized but is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from conftest import build_llama
from torch import nn

from qlora_kit.errors import ModelError
from qlora_kit.model import blocks
from qlora_kit.model.base import Base
from qlora_kit.model.bits import quantized_bits
from qlora_kit.model.quantized import (
    Quantized,
    count_quantized,
    four_bit_modules,
    is_four_bit,
    is_quantized,
    never_repacked,
    require_quantized,
)
from qlora_kit.recipe import QuantizationSpec

from .zoo import load, skeleton_of

FOUR = QuantizationSpec()
EIGHT = QuantizationSpec(load_in_8bit=True)
SIXTEEN = QuantizationSpec(load_in_4bit=False)
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of the tiny Llama, by hand: attention and MLP of two layers, embedding and head, five norms.
LINEAR = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
EMBEDDING = 384 * 64
NORMS = 5 * 64


def packed(outputs: int, inputs: int, **options: Any) -> bnb.nn.Linear4bit:
    """One layer, quantized in 4 bits as loading does it."""
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, quant_type="nf4", **options)
    layer.load_state_dict({"weight": torch.randn(outputs, inputs)})
    return layer.to("cpu")


def required(
    base: Base, quantization: QuantizationSpec, expected: QuantizationSpec | None = None
) -> Quantized:
    bits = quantized_bits(base.skeleton, expected or quantization)
    return require_quantized(base.model, quantization, bits)


class TestTheCount:
    @pytest.mark.parametrize(
        ("quantization", "num_quantized"),
        [
            (FOUR, LINEAR),
            (QuantizationSpec(quant_storage="float32"), LINEAR),
            (QuantizationSpec(double_quant=False), LINEAR),
            (QuantizationSpec(skip_modules=("up_proj",)), LINEAR - 2 * 64 * 128),
            (EIGHT, LINEAR),
            (SIXTEEN, 0),
        ],
        ids=["4", "stored in float32", "single", "skipped", "8", "16"],
    )
    def test_is_of_parameters_however_they_are_packed(
        self, tiny_llama_untied: Path, quantization: QuantizationSpec, num_quantized: int
    ) -> None:
        base = load(tiny_llama_untied, quantization)
        found = base.quantized
        assert found.num_quantized == num_quantized
        assert found.num_parameters == LINEAR + 2 * EMBEDDING + NORMS
        assert found.share == num_quantized / (LINEAR + 2 * EMBEDDING + NORMS)
        assert count_quantized(base.model) == found

    def test_holds_a_tied_head_once(self, tiny_llama: Path) -> None:
        assert load(tiny_llama).quantized.num_parameters == LINEAR + EMBEDDING + NORMS

    def test_of_an_odd_number_of_parameters(self) -> None:
        """Fifteen of them take eight bytes."""
        layer = packed(3, 5, compress_statistics=False)
        assert layer.weight.numel() == 8
        assert count_quantized(layer) == Quantized(15, 15, 8 + 4 + 16 * 4)

    @pytest.mark.parametrize(
        ("double_quant", "num_bytes"),
        [
            (False, 4096 // 2 + 64 * 4 + 16 * 4),
            (True, 4096 // 2 + 64 * 1 + 16 * 4 + 4 + 1 * 4 + 256 * 4),
        ],
    )
    def test_of_bytes_holds_the_scales(self, double_quant: bool, num_bytes: int) -> None:
        """A scale for each 64 numbers; quantized, with an offset, one scale and a table more."""
        layer = packed(64, 64, compress_statistics=double_quant)
        assert count_quantized(layer).weight_bytes == num_bytes

    def test_of_bytes_in_other_precisions(self) -> None:
        assert count_quantized(nn.Linear(4, 8)).weight_bytes == (32 + 8) * 4
        assert count_quantized(nn.Linear(4, 8).to(torch.bfloat16)).weight_bytes == (32 + 8) * 2


class TestWhatIsQuantized:
    def test_is_seen_by_the_weight(self) -> None:
        layer, plain = packed(4, 64), nn.Linear(64, 4)
        assert is_quantized(layer)
        assert is_four_bit(layer.weight)
        assert not is_quantized(plain)
        assert not is_four_bit(plain.weight)
        assert not is_quantized(nn.ReLU())
        assert list(four_bit_modules(nn.Sequential(layer, plain))) == [layer]

    def test_is_not_what_is_only_of_the_class(self) -> None:
        """Before it is moved to a device, a 4-bit layer holds plain numbers."""
        layer = bnb.nn.Linear4bit(64, 4)
        assert not is_four_bit(layer.weight)

    def test_eight_bits_are_not_four(self, tiny_llama: Path) -> None:
        base = load(tiny_llama, EIGHT)
        layer = base.model.model.layers[0].mlp.up_proj
        assert is_quantized(layer)
        assert not is_four_bit(layer.weight)
        assert list(four_bit_modules(base.model)) == []


class TestWhatWasMissed:
    @pytest.fixture
    def base(self, tiny_llama_untied: Path) -> Base:
        return load(tiny_llama_untied)

    @pytest.fixture
    def eight(self, tiny_llama_untied: Path) -> Base:
        return load(tiny_llama_untied, EIGHT)

    @staticmethod
    def replace(model: nn.Module, *names: str) -> None:
        for name in names:
            old: Any = model.get_submodule(name)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Linear(old.in_features, old.out_features))

    @pytest.mark.parametrize("quantization", [FOUR, EIGHT], ids=["4", "8"])
    def test_is_named(self, base: Base, eight: Base, quantization: QuantizationSpec) -> None:
        loaded = base if quantization is FOUR else eight
        self.replace(loaded.model, "model.layers.1.mlp.up_proj")
        with pytest.raises(ModelError) as caught:
            required(loaded, quantization)
        assert "1 linear layers were left unquantized (model.layers.1.mlp.up_proj)" in str(
            caught.value
        )
        assert "quantization.skip_modules" in str(caught.value)

    def test_is_counted_where_there_is_much(self, base: Base) -> None:
        self.replace(base.model, *(f"model.layers.0.self_attn.{kind}_proj" for kind in "qkvo"))
        with pytest.raises(ModelError, match=r"4 linear layers .*q_proj, .*k_proj, .*v_proj …\)"):
            required(base, FOUR)

    def test_is_no_fault_where_it_is_meant(self, base: Base) -> None:
        """By the recipe, or by what a stored checkpoint says of itself."""
        self.replace(base.model, "model.layers.1.mlp.up_proj")
        skipping = QuantizationSpec(skip_modules=("layers.1.mlp.up_proj",))
        found = required(base, skipping)
        assert found.num_quantized == LINEAR - 64 * 128
        stored = required(base, FOUR, skipping)
        assert stored == found

    def test_is_not_the_head(self, base: Base) -> None:
        assert not is_quantized(base.model.lm_head)
        required(base, FOUR)

    def test_is_nothing_in_sixteen_bits(self, base: Base) -> None:
        self.replace(base.model, "model.layers.1.mlp.up_proj")
        required(base, SIXTEEN)

    @pytest.mark.parametrize("load_in_8bit", [False, True])
    def test_is_everything(self, tiny_llama: Path, load_in_8bit: bool) -> None:
        spec = QuantizationSpec(load_in_8bit=load_in_8bit, skip_modules=KINDS)
        with pytest.raises(ModelError, match=r"nothing was quantized.*load_in_4bit: false"):
            load(tiny_llama, spec)

    def test_is_another_shape(self, base: Base) -> None:
        layer = base.model.model.layers[1].mlp.up_proj
        layer.out_features = 96
        words = r"layers\.1\.mlp\.up_proj was loaded in shape \[128, 64\].*describes \[96, 64\]"
        with pytest.raises(ModelError, match=words):
            required(base, FOUR)

    def test_is_another_shape_in_eight_bits(self, eight: Base) -> None:
        eight.model.model.layers[1].mlp.up_proj.in_features = 48
        with pytest.raises(ModelError, match=r"in shape \[128, 64\].*describes \[128, 48\]"):
            required(eight, EIGHT)

    @pytest.mark.parametrize(
        "quantization", [QuantizationSpec(double_quant=False), QuantizationSpec(quant_type="fp4")]
    )
    def test_is_another_kind(self, base: Base, quantization: QuantizationSpec) -> None:
        with pytest.raises(ModelError, match=r"q_proj was loaded as nf4 with double quantization"):
            required(base, quantization)


def test_conv1d_has_its_shape_once_it_is_packed(tmp_path: Path) -> None:
    """Its weight is stored (in, out), and packed (out, in)."""
    from .zoo import DENSE, build

    base = load(build(tmp_path, *DENSE["gpt2: Conv1D, tied"]))
    layer: Any = base.model.transformer.h[0].mlp.c_fc
    assert tuple(layer.weight.quant_state.shape) == (256, 64)
    skeleton = skeleton_of("gpt2: Conv1D, tied")
    stored = skeleton.model.get_submodule("transformer.h.0.mlp.c_fc").weight
    assert isinstance(stored, torch.Tensor)
    assert tuple(stored.shape) == (64, 256)


def test_an_evaluation_repacks_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes does on a CPU with AVX512-BF16, which every CPU is here."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    assert layer.support_avx512bf16_for_cpu
    model = torch.nn.Sequential(layer.to("cpu")).eval()
    packed = layer.weight.data.clone()
    never_repacked(model)
    with torch.no_grad():
        model(torch.ones(2, 64))
    assert torch.equal(layer.weight.data, packed)


class TestBlocksThatDoNotFit:
    """Layers whose inputs are no whole number of blocks."""

    def test_what_this_machine_misreads_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "odd"
        build_llama(folder, tied=False, intermediate_size=96)
        monkeypatch.setattr(blocks, "reads_right", lambda *asked: False)
        with pytest.raises(ModelError, match=r"has 96 inputs.*skip_modules: \[down_proj\]"):
            load(folder)
        assert load(folder, QuantizationSpec(skip_modules=("down_proj",))).model is not None
        monkeypatch.setattr(blocks, "reads_right", lambda *asked: True)
        assert load(folder).model is not None

    def test_blocks_that_fit_are_not_tried(
        self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(blocks, "reads_right", lambda *asked: pytest.fail("was tried"))
        load(tiny_llama)
