"""Which layers are quantized, and what is refused before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_tiny
from transformers import GPT2Config, MixtralConfig

from qlora_kit.errors import AdapterError, ModelError, TrainingError
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.base import Base
from qlora_kit.model.qat.attach import (
    fake_quantization_of,
    quantized_in_training,
    refuse_unaware,
    trained_in_full,
)
from qlora_kit.model.qat.aware import Aware, aware_of
from qlora_kit.model.qat.linear import QuantizedLinear, QuantizedLora
from qlora_kit.model.skeleton import build_skeleton
from qlora_kit.recipe import LoraSpec, QuantizationAwareSpec, QuantizationSpec
from qlora_kit.train.quantization import QuantizationStart


def aware(**values: Any) -> Aware:
    return Aware(QuantizationAwareSpec(**{"method": "nf4", **values}), torch.float32)


def mixtral() -> MixtralConfig:
    """Experts in one tensor, and a router."""
    return MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )


def base_of(folder: Path, spec: QuantizationAwareSpec | None = None) -> Base:
    return load_tiny(folder, QuantizationSpec(load_in_4bit=False), aware=spec)


def test_every_linear_layer_but_the_head(tiny_llama_untied: Path) -> None:
    base = base_of(tiny_llama_untied)
    model = attach_adapter(base, LoraSpec(target_modules=("q_proj",)), 0, aware()).model
    kinds = {name: type(module) for name, module in base.model.named_modules()}
    assert kinds["model.layers.0.self_attn.q_proj"] is QuantizedLora
    assert kinds["model.layers.1.mlp.down_proj"] is QuantizedLinear
    assert kinds["lm_head"] is torch.nn.Linear
    assert len(quantized_in_training(base.skeleton, aware().spec)) == 14
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert len(trained) == 4
    assert all(".q_proj.lora_" in name for name in trained)


def test_skipped_layers_stay_as_they_are(tiny_llama: Path) -> None:
    base = base_of(tiny_llama)
    seen = aware(skip_modules=["down_proj", "model.layers.0"])
    attach_adapter(base, LoraSpec(r=4), 0, seen)
    found = [
        name for name, module in base.model.named_modules() if isinstance(module, QuantizedLora)
    ]
    assert len(found) == 6
    assert all(name.startswith("model.layers.1.") for name in found)
    assert not any("down_proj" in name for name in found)


def test_a_model_that_is_not_aware_is_left_alone(tiny_llama: Path) -> None:
    assert aware_of(None, "auto", torch.float32) is None
    assert fake_quantization_of(attach_adapter(base_of(tiny_llama), LoraSpec(), 0).model) is None


def test_the_merged_dtype_is_the_computed_one_unless_said_otherwise() -> None:
    spec = QuantizationAwareSpec(method="nf4")
    for said, wanted in (("auto", torch.bfloat16), ("float32", torch.float32)):
        found = aware_of(spec, said, torch.bfloat16)
        assert found is not None
        assert found.merged_dtype == wanted


class TestFull:
    """`train: full`."""

    def test_every_linear_layer_but_the_head_is_trained(self, tiny_llama_untied: Path) -> None:
        base = base_of(tiny_llama_untied)
        adapted = attach_adapter(base, LoraSpec(), 0, aware(train="full"))
        linear = {
            f"{name}.weight": base.skeleton.model.get_submodule(name).weight.numel()
            for name in base.skeleton.linear_modules
        }
        trained = {
            name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): one
            for name, one in adapted.model.named_parameters()
            if one.requires_grad
        }
        assert trained.keys() == linear.keys()
        assert all(one.dtype == torch.float32 for one in trained.values())
        assert adapted.num_trainable == sum(linear.values())
        assert adapted.num_parameters == base.quantized.num_parameters
        assert adapted.in_full["q_proj"] == 2
        assert adapted.targets == {}

    def test_the_adapter_off_is_the_quantized_base(self, tiny_llama: Path) -> None:
        """As with an adapter: the base that a run is compared with is quantized alike."""
        full, low_rank = (
            attach_adapter(base_of(tiny_llama), LoraSpec(), 0, aware(train=train)).model
            for train in ("full", "adapter")
        )
        ids = torch.arange(3, 20).unsqueeze(0)
        with torch.no_grad():
            start = full(input_ids=ids).logits
            for parameter in full.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
            assert not torch.equal(full(input_ids=ids).logits, start)
            with full.disable_adapter(), low_rank.disable_adapter():
                assert torch.equal(full(input_ids=ids).logits, start)
                assert torch.equal(low_rank(input_ids=ids).logits, start)

    def test_skipped_layers_are_trained_and_not_quantized(self, tiny_llama: Path) -> None:
        base = base_of(tiny_llama)
        seen = aware(train="full", skip_modules=["down_proj"])
        model = attach_adapter(base, LoraSpec(), 0, seen).model
        mlp = base.model.model.layers[0].mlp
        assert type(mlp.down_proj.modules_to_save["default"]) is torch.nn.Linear
        assert type(mlp.up_proj.modules_to_save["default"]) is QuantizedLinear
        trained = [name for name, one in model.named_parameters() if one.requires_grad]
        assert sum("down_proj" in name for name in trained) == 2

    def test_routers_stay_as_they_are(self) -> None:
        skeleton = build_skeleton(mixtral())
        names = trained_in_full(skeleton)
        assert {name.rpartition(".")[2] for name in names} == {
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
        }

    def test_what_of_lora_does_not_suit_the_model_does_not_matter(self, tiny_llama: Path) -> None:
        base = load_tiny(
            tiny_llama,
            QuantizationSpec(load_in_4bit=False),
            lora=LoraSpec(target_modules=("no_such",)),
            aware=aware(train="full").spec,
        )
        assert base.quantized.num_quantized == 0

    def test_a_record_of_before_is_of_an_adapter(self) -> None:
        record = aware().record()
        del record["train"]
        found = Aware.from_record(record)
        assert found is not None
        assert found.spec.train == "adapter"


class TestRecord:
    def test_there_and_back(self) -> None:
        seen = Aware(
            QuantizationAwareSpec(method="int4-group", group_size=32, skip_modules=("a",)),
            torch.bfloat16,
        )
        assert Aware.from_record(seen.record()) == seen
        assert Aware.from_record(None) is None

    @pytest.mark.parametrize("change", [{"method": "nf5"}, {"merged_dtype": "nn"}, {"x": 1}])
    def test_a_damaged_one(self, change: dict[str, Any]) -> None:
        with pytest.raises(AdapterError, match="quantization_aware"):
            Aware.from_record({**aware().record(), **change})


class TestRefused:
    def test_experts_in_one_tensor(self) -> None:
        with pytest.raises(ModelError, match=r"mixtral.*experts.*dense model"):
            refuse_unaware(build_skeleton(mixtral()), aware().spec)

    def test_a_group_that_does_not_divide(self, tiny_llama: Path) -> None:
        spec = QuantizationAwareSpec(method="int4-group", group_size=128)
        with pytest.raises(ModelError, match=r"q_proj has 64 inputs.*group_size \(128\)"):
            base_of(tiny_llama, spec)

    @pytest.mark.parametrize("method", ["int8", "int4-group"])
    def test_layers_that_a_format_does_not_know(self, method: str) -> None:
        config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2)
        with pytest.raises(ModelError, match=f"Conv1D, which {method} checkpoints cannot hold"):
            refuse_unaware(build_skeleton(config), aware(method=method).spec)

    def test_a_skip_that_skips_nothing(self, tiny_llama: Path) -> None:
        with pytest.raises(ModelError, match=r"skip_modules: nowhere.*one of them is model"):
            base_of(tiny_llama, aware(skip_modules=["nowhere"]).spec)

    def test_nothing_left(self, tiny_llama: Path) -> None:
        with pytest.raises(ModelError, match="no linear layer is left"):
            base_of(tiny_llama, aware(skip_modules=["model"]).spec)

    def test_trained_in_full_and_quantized(self, tiny_llama: Path) -> None:
        spec = LoraSpec(target_modules=("q_proj",), modules_to_save=("down_proj",))
        with pytest.raises(AdapterError, match=r"down_proj is trained in full and quantized"):
            attach_adapter(base_of(tiny_llama), spec, 0, aware())

    def test_a_start_after_the_end(self, tiny_llama: Path) -> None:
        model = attach_adapter(base_of(tiny_llama), LoraSpec(), 0, aware(start_after=9)).model
        quantization = fake_quantization_of(model)
        assert quantization is not None
        QuantizationStart(quantization, 10)
        with pytest.raises(TrainingError, match=r"first 9 updates.*only 9"):
            QuantizationStart(quantization, 9)
