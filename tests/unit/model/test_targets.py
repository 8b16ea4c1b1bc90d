"""Which modules an adapter goes on, found on the skeleton, and what is refused there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.model.base import refuse_unquantizable
from qlora_kit.model.targets import Targets, find_targets, refuse_dora, require_targets
from qlora_kit.recipe import LoraSpec, QuantizationSpec

from .zoo import MIXTURES, skeleton_of

FOUR = QuantizationSpec()
EIGHT = QuantizationSpec(load_in_8bit=True)
SIXTEEN = QuantizationSpec(load_in_4bit=False)
UNTIED, TIED, GPT2 = "llama, untied", "llama, tied", "gpt2: Conv1D, tied"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def targets(name: str, **lora: Any) -> Targets:
    return find_targets(skeleton_of(name), LoraSpec(r=4, **lora))


def in_layers(part: str, *kinds: str, layers: tuple[int, ...] = (0, 1)) -> set[str]:
    return {f"model.layers.{layer}.{part}.{kind}" for layer in layers for kind in kinds}


class TestAllLinear:
    @pytest.mark.parametrize("name", [UNTIED, TIED])
    def test_is_every_linear_layer_but_the_head(self, name: str) -> None:
        found = targets(name)
        wanted = in_layers("self_attn", *ATTENTION) | in_layers("mlp", *MLP)
        assert set(found.modules) == wanted
        assert set(found.named) == {*ATTENTION, *MLP}

    def test_a_head_by_another_name_is_left_out_too(self) -> None:
        found = targets("gpt-neox: fused QKV")
        assert {name.rpartition(".")[2] for name in found.modules} == {
            "query_key_value",
            "dense",
            "dense_h_to_4h",
            "dense_4h_to_h",
        }

    @pytest.mark.parametrize("name", MIXTURES)
    def test_no_router_carries_an_adapter(self, name: str) -> None:
        skeleton = skeleton_of(name)
        found = find_targets(skeleton, LoraSpec())
        parts = {part for module in found.modules for part in module.split(".")}
        assert parts & {"router", "gate", "shared_expert_gate"} == set()
        assert found.modules
        assert all("experts" not in module.split(".") for module in found.modules)

    def test_what_peft_is_told_spares_the_routers(self) -> None:
        """By kinds alone, PEFT would match a router that shares its last name with a layer."""
        skeleton = skeleton_of("llama4: a router that is a linear layer")
        assert skeleton.router_modules
        found = find_targets(skeleton, LoraSpec())
        assert set(skeleton.router_modules) <= set(found.excluded)

    def test_conv1d_is_linear(self) -> None:
        skeleton = skeleton_of(GPT2)
        found = find_targets(skeleton, LoraSpec())
        modules = [skeleton.model.get_submodule(name) for name in found.modules]
        assert len(modules) == 8
        assert all(isinstance(module, Conv1D) for module in modules)
        assert set(found.named) == {"c_attn", "c_proj", "c_fc"}


class TestAList:
    def test_names_are_last_parts(self) -> None:
        found = targets(UNTIED, target_modules=("q_proj", "up_proj"))
        assert set(found.modules) == in_layers("self_attn", "q_proj") | in_layers("mlp", "up_proj")

    def test_names_may_be_longer(self) -> None:
        found = targets(UNTIED, target_modules=("layers.1.self_attn.q_proj",))
        assert found.modules == found.named == ("model.layers.1.self_attn.q_proj",)

    def test_a_part_of_a_last_part_does_not_match(self) -> None:
        with pytest.raises(AdapterError, match=r"lora.target_modules: proj matches no module"):
            targets(UNTIED, target_modules=("proj",))

    def test_the_head_and_embeddings_when_they_are_named(self) -> None:
        found = targets(UNTIED, target_modules=("lm_head", "embed_tokens"))
        assert set(found.modules) == {"lm_head", "model.embed_tokens"}

    @pytest.mark.parametrize("wanted", [("nonsense",), ("q_proj", "nonsense", "v_proj")])
    def test_a_name_that_matches_nothing(self, wanted: tuple[str, ...]) -> None:
        """PEFT is content when one of several matches."""
        with pytest.raises(AdapterError) as caught:
            targets(UNTIED, target_modules=wanted)
        assert "lora.target_modules: nonsense matches no module" in str(caught.value)
        assert "the model has " in str(caught.value)
        assert "down_proj" in str(caught.value)

    def test_what_no_adapter_goes_on(self) -> None:
        with pytest.raises(AdapterError, match=r"matches model.layers.0.mlp, a LlamaMLP"):
            targets(UNTIED, target_modules=("q_proj", "mlp"))

    def test_a_fused_expert(self) -> None:
        with pytest.raises(AdapterError, match=r"lora.target_modules: w1 matches no module"):
            targets("mixtral", target_modules=("w1",))

    def test_a_layer_that_peft_takes_for_a_fused_expert(self) -> None:
        with pytest.raises(AdapterError, match="PEFT takes up_proj for the fused experts"):
            targets("qwen3-moe, one dense layer", target_modules=("q_proj", "up_proj"))

    def test_a_router_alone(self) -> None:
        with pytest.raises(AdapterError, match="router matches no module that is not left out"):
            targets("llama4: a router that is a linear layer", target_modules=("router",))


class TestARegularExpression:
    def test_is_held_against_full_names(self) -> None:
        found = targets(UNTIED, target_modules=r".*\.1\.(self_attn\.[qv]_proj|mlp\.up_proj)")
        assert set(found.modules) == {
            *in_layers("self_attn", "q_proj", "v_proj", layers=(1,)),
            *in_layers("mlp", "up_proj", layers=(1,)),
        }

    @pytest.mark.parametrize("pattern", [r"self_attn\.q_proj", r".*\.q_pro", "nonsense.*"])
    def test_that_matches_no_full_name(self, pattern: str) -> None:
        with pytest.raises(AdapterError) as caught:
            targets(UNTIED, target_modules=pattern)
        assert f"lora.target_modules: {pattern} matches no module" in str(caught.value)

    def test_that_matches_a_block(self) -> None:
        with pytest.raises(AdapterError, match=r"matches model.layers.0.self_attn, a Llama"):
            targets(UNTIED, target_modules=r".*self_attn.*")


class TestExclusions:
    def test_a_kind(self) -> None:
        found = targets(UNTIED, exclude_modules=("down_proj", "k_proj"))
        kinds = {name.rpartition(".")[2] for name in found.modules}
        assert kinds == {*ATTENTION, *MLP} - {"down_proj", "k_proj"}

    def test_one_module(self) -> None:
        found = targets(UNTIED, exclude_modules=("layers.0.mlp.up_proj",))
        assert set(found.modules) == (
            in_layers("self_attn", *ATTENTION) | in_layers("mlp", *MLP)
        ) - {"model.layers.0.mlp.up_proj"}
        assert found.excluded == ("layers.0.mlp.up_proj",)

    def test_from_a_list_and_from_an_expression(self) -> None:
        wanted = set(in_layers("self_attn", "q_proj", layers=(1,)))
        excluded = ("layers.0.self_attn.q_proj",)
        for given in (("q_proj",), r".*q_proj"):
            found = targets(UNTIED, target_modules=given, exclude_modules=excluded)
            assert set(found.modules) == wanted

    @pytest.mark.parametrize("excluded", [("nonsense",), ("q_proj", "nonsense")])
    def test_that_match_nothing(self, excluded: tuple[str, ...]) -> None:
        with pytest.raises(AdapterError, match=r"lora.exclude_modules: nonsense matches no module"):
            targets(UNTIED, exclude_modules=excluded)

    def test_that_leave_nothing(self) -> None:
        with pytest.raises(AdapterError, match="q_proj matches no module that is not left out"):
            targets(UNTIED, target_modules=("q_proj",), exclude_modules=("q_proj",))


class TestPatterns:
    @pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
    def test_that_match_nothing(self, key: str) -> None:
        with pytest.raises(AdapterError, match=rf"lora.{key}: nonsense matches no module"):
            targets(UNTIED, **{key: {"q_proj": 2, "nonsense": 2}})

    def test_that_match_only_what_carries_no_adapter(self) -> None:
        with pytest.raises(AdapterError, match=r"lora.rank_pattern: up_proj matches no module"):
            targets(UNTIED, target_modules=("q_proj",), rank_pattern={"up_proj": 2})

    @pytest.mark.parametrize(
        "pattern", ["q_proj", r"layers\.0\.self_attn\.[qk]_proj", "layers.1.*"]
    )
    def test_that_match(self, pattern: str) -> None:
        assert len(targets(UNTIED, rank_pattern={pattern: 2}).modules) == 14


class TestWhatIsTrainedInFull:
    def test_carries_no_adapter(self) -> None:
        found = targets(UNTIED, target_modules=("q_proj", "lm_head"), modules_to_save=("lm_head",))
        assert set(found.modules) == in_layers("self_attn", "q_proj")
        assert found.saves("lm_head")
        assert not found.saves("model.layers.0.self_attn.q_proj")

    def test_must_match_something(self) -> None:
        with pytest.raises(AdapterError, match=r"lora.modules_to_save: nonsense matches no module"):
            targets(UNTIED, modules_to_save=("lm_head", "nonsense"))

    def test_is_one_module_where_peft_would_take_more(self) -> None:
        """PEFT asks for no dot before the name, and would train the two of each layer as well."""
        found = targets(UNTIED, modules_to_save=("norm",))
        assert found.modules_to_save == ("model.norm",)

    @pytest.mark.parametrize("quantization", [FOUR, EIGHT])
    def test_cannot_be_quantized(self, quantization: QuantizationSpec) -> None:
        spec = LoraSpec(modules_to_save=("up_proj",))
        with pytest.raises(AdapterError, match=r"up_proj is quantized to [48] bits.*skip_modules"):
            require_targets(skeleton_of(UNTIED), spec, quantization)
        skipped = QuantizationSpec(
            load_in_8bit=quantization.load_in_8bit, skip_modules=("up_proj",)
        )
        require_targets(skeleton_of(UNTIED), spec, skipped)
        require_targets(skeleton_of(UNTIED), spec, SIXTEEN)

    def test_the_head_is_not_quantized(self) -> None:
        require_targets(skeleton_of(UNTIED), LoraSpec(modules_to_save=("lm_head",)), FOUR)


class TestNewTokens:
    def test_may_be_all_that_is_trained(self) -> None:
        found = targets(UNTIED, exclude_modules=(*ATTENTION, *MLP), new_tokens=("<a>",))
        assert found.modules == ()

    @pytest.mark.parametrize(
        ("name", "key", "module"),
        [
            (UNTIED, "target_modules", "embed_tokens"),
            (UNTIED, "target_modules", "lm_head"),
            (UNTIED, "modules_to_save", "embed_tokens"),
            (TIED, "target_modules", "lm_head"),
            (TIED, "modules_to_save", "lm_head"),
            (GPT2, "modules_to_save", "lm_head"),
        ],
    )
    def test_stand_beside_nothing_else_on_the_same_matrix(
        self, name: str, key: str, module: str
    ) -> None:
        """On a tied head PEFT would fail at the first forward pass."""
        spec = LoraSpec(new_tokens=("<a>",), **{key: (module,)})
        with pytest.raises(AdapterError, match=rf"new rows of .*{module}, and lora\.{key} all of"):
            require_targets(skeleton_of(name), spec, FOUR)

    def test_go_with_a_head_of_its_own_that_is_trained_in_full(self) -> None:
        spec = LoraSpec(new_tokens=("<a>",), modules_to_save=("lm_head",))
        require_targets(skeleton_of(UNTIED), spec, FOUR)
        require_targets(skeleton_of("phi"), spec, FOUR)

    def test_on_a_head_with_a_bias_which_peft_would_drop(self) -> None:
        spec = LoraSpec(new_tokens=("<a>",))
        with pytest.raises(
            AdapterError, match=r"the bias of lm_head.*name lm_head in lora.modules"
        ):
            require_targets(skeleton_of("phi"), spec, FOUR)
        with pytest.raises(AdapterError, match=r"the bias of lm_head.*drop it"):
            require_targets(skeleton_of("phi", tie_word_embeddings=True), spec, FOUR)


class TestFusedExperts:
    @pytest.mark.parametrize("quantization", [FOUR, EIGHT])
    def test_are_refused_with_their_share(self, quantization: QuantizationSpec) -> None:
        """3 matrices of 64 × 128 for each of 4 experts in 2 layers, of all parameters."""
        skeleton = skeleton_of("mixtral")
        share = 2 * 4 * 3 * 64 * 128 / sum(one.numel() for one in skeleton.model.parameters())
        with pytest.raises(ModelError) as caught:
            refuse_unquantizable(skeleton, quantization)
        assert "mixtral keeps its experts in fused tensors" in str(caught.value)
        assert f"{share:.0%} of the parameters" in str(caught.value)
        assert "quantization.load_in_4bit: false" in str(caught.value)

    def test_pass_in_sixteen_bits(self) -> None:
        refuse_unquantizable(skeleton_of("mixtral"), SIXTEEN)


class TestLoftq:
    def test_needs_a_quantized_base(self) -> None:
        with pytest.raises(AdapterError, match="this base is not quantized; use init: default"):
            require_targets(skeleton_of(UNTIED), LoraSpec(init="loftq"), SIXTEEN)
        require_targets(skeleton_of(UNTIED), LoraSpec(init="loftq"), FOUR)

    def test_needs_the_weights_from_before(self) -> None:
        stored = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
        skeleton = skeleton_of(UNTIED, quantization_config=stored)
        with pytest.raises(AdapterError, match="this base is stored quantized"):
            require_targets(skeleton, LoraSpec(init="loftq"), FOUR)


class TestDora:
    def test_is_refused_only_where_peft_loses_the_scales(self) -> None:
        with pytest.raises(AdapterError, match=r"DoRA on an 8-bit base on a CPU.*load_in_4bit"):
            refuse_dora(True, EIGHT, "cpu")
        with pytest.raises(AdapterError, match="8-bit base"):
            refuse_dora(True, QuantizationSpec(overrides={"v_proj": 8}), "cpu")
        for use_dora, base, device in ((False, EIGHT, "cpu"), (True, FOUR, "cpu")):
            refuse_dora(use_dora, base, device)
        refuse_dora(True, EIGHT, "cuda")


def test_nothing_of_this_needs_weights() -> None:
    assert {one.device for one in skeleton_of(UNTIED).model.parameters()} == {torch.device("meta")}
