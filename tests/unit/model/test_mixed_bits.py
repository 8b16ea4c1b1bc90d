"""A base whose layers are kept in different widths: loaded, trained on, saved, dequantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.environment import probe_hardware
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.export.dequantize import dequantize_checkpoint
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.base import Base, load_base, loading_config
from qlora_kit.model.bits import module_bits, override_matches, quantized_bits
from qlora_kit.model.manifest import differences, manifest_for
from qlora_kit.model.prequantized import stored_quantization
from qlora_kit.model.quantized import count_quantized
from qlora_kit.model.saved import load_adapter, save_adapter
from qlora_kit.model.shared import state_checksum
from qlora_kit.model.weight import dequantized_weight
from qlora_kit.recipe import LoraSpec, ModelSpec, QuantizationSpec

from .zoo import DENSE, build, load, logits, shake, skeleton_of, some_ids, train_a_step

BLOCK = "model.layers.0"
MIXED = QuantizationSpec(
    overrides={"layers.0.mlp.down_proj": 16, "v_proj": 8, "layers.1.self_attn.v_proj": 4}
)
UNTIED = "llama, untied"


def width(module: Any) -> int:
    kind = type(module.weight).__name__
    return {"Params4bit": 4, "Int8Params": 8}.get(kind, 16)


def widths(model: torch.nn.Module, names: Any) -> dict[str, int]:
    return {name: width(model.get_submodule(name)) for name in names}


class TestPatterns:
    @pytest.mark.parametrize(
        ("pattern", "matches"),
        [
            ("model.layers.1.mlp.down_proj", True),
            ("layers.1.mlp.down_proj", True),
            ("down_proj", True),
            ("layers.1", True),
            ("mlp", True),
            ("*.down_proj", True),
            ("layers.*.mlp", True),
            ("d*_proj", True),
            ("layers.11", False),
            ("proj", False),
            ("down", False),
            ("layers.1.down_proj", False),
        ],
    )
    def test_are_whole_parts_of_a_name(self, pattern: str, matches: bool) -> None:
        assert override_matches("model.layers.1.mlp.down_proj", pattern) is matches

    def test_longer_ones_hold_against_shorter_ones(self) -> None:
        bits = module_bits(skeleton_of(UNTIED), MIXED)
        assert bits[f"{BLOCK}.mlp.down_proj"] == 16
        assert bits["model.layers.1.mlp.down_proj"] == 4
        assert bits[f"{BLOCK}.self_attn.v_proj"] == 8
        assert bits["model.layers.1.self_attn.v_proj"] == 4
        assert bits["lm_head"] == 16
        assert set(quantized_bits(skeleton_of(UNTIED), MIXED).values()) == {4, 8}

    def test_hold_against_skip_modules(self) -> None:
        spec = QuantizationSpec(skip_modules=("up_proj",), overrides={"layers.1.mlp.up_proj": 8})
        bits = module_bits(skeleton_of(UNTIED), spec)
        assert bits["model.layers.1.mlp.up_proj"] == 8
        assert bits["model.layers.0.mlp.up_proj"] == 16

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            ({"w_proj": 8}, r"w_proj matches no linear layer; .*q_proj"),
            ({"input_layernorm": 8}, "matches no linear layer"),
            ({"lm_head": 8}, "lm_head matches lm_head, which is the head"),
            (
                {"layers.0.mlp": 8, "layers.0.mlp*": 16},
                r"layers\.0\.mlp gives .* 8 bits, and layers\.0\.mlp\*, which is as long, 16",
            ),
            (
                {"mlp": 8, "up_proj": 4, "gate_proj": 4, "down_proj": 16},
                r"mlp decides nothing: longer patterns \(such as gate_proj\)",
            ),
        ],
    )
    def test_that_say_nothing_are_refused(self, overrides: dict[str, Any], words: str) -> None:
        with pytest.raises(ModelError, match=words):
            module_bits(skeleton_of(UNTIED), QuantizationSpec(overrides=overrides))

    def test_may_name_the_head_to_stay_as_it_is(self) -> None:
        spec = QuantizationSpec(overrides={"lm_head": 16})
        assert module_bits(skeleton_of(UNTIED), spec)["lm_head"] == 16


class TestWhatIsLoaded:
    def test_is_each_layer_in_its_width(self, tiny_llama_untied: Path) -> None:
        base = load(tiny_llama_untied, MIXED)
        expected = module_bits(base.skeleton, MIXED)
        assert widths(base.model, expected) == expected
        assert sorted(set(expected.values())) == [4, 8, 16]

    def test_says_what_the_layers_say_alone(self, tiny_llama_untied: Path) -> None:
        """Each weight is the one of a base that is in that width throughout."""
        mixed = load(tiny_llama_untied, MIXED)
        of = {
            4: load(tiny_llama_untied),
            8: load(tiny_llama_untied, QuantizationSpec(load_in_8bit=True)),
            16: load(tiny_llama_untied, QuantizationSpec(load_in_4bit=False)),
        }
        for name, bits in module_bits(mixed.skeleton, MIXED).items():
            one = dequantized_weight(mixed.model.get_submodule(name))
            other = dequantized_weight(of[bits].model.get_submodule(name))
            assert torch.equal(one, other), name

    @pytest.mark.parametrize(
        "quantization",
        [
            QuantizationSpec(load_in_8bit=True, overrides={"v_proj": 4}),
            QuantizationSpec(load_in_4bit=False, overrides={"mlp": 4, "v_proj": 8}),
            QuantizationSpec(load_in_4bit=False, overrides={"mlp": 8}),
            QuantizationSpec(overrides={"mlp": 16}),
            QuantizationSpec(quant_type="fp4", double_quant=False, overrides={"o_proj": 8}),
        ],
        ids=["8 and 4", "16, 8 and 4", "16 and 8", "4 and 16", "fp4 and 8"],
    )
    def test_is_any_mixture(self, tiny_llama: Path, quantization: QuantizationSpec) -> None:
        base = load(tiny_llama, quantization)
        expected = module_bits(base.skeleton, quantization)
        assert widths(base.model, expected) == expected
        assert torch.isfinite(logits(base.model)).all()

    def test_needs_no_quantizer_of_our_own_without_a_mixture(self) -> None:
        skeleton = skeleton_of(UNTIED)
        for overrides in ({"v_proj": 16}, {"layers.0.mlp": 16, "q_proj": 16}):
            config = loading_config(QuantizationSpec(overrides=overrides), skeleton, torch.float32)
            assert type(config).__name__ == "BitsAndBytesConfig"
        mixed = loading_config(MIXED, skeleton, torch.float32)
        assert type(mixed).__name__ == "MixedBitsConfig"

    def test_is_turned_where_the_library_turns_it(self, tmp_path: Path) -> None:
        """GPT-2 stores its matrices (in, out)."""
        folder = build(tmp_path, *DENSE["gpt2: Conv1D, tied"])
        spec = QuantizationSpec(overrides={"c_attn": 8, "h.1.mlp.c_fc": 16})
        base = load(folder, spec)
        plain = load(folder, QuantizationSpec(load_in_4bit=False))
        assert width(base.model.get_submodule("transformer.h.0.attn.c_attn")) == 8
        difference = (logits(base.model) - logits(plain.model)).abs().mean()
        assert difference < 0.1 * logits(plain.model).abs().mean()


class TestTraining:
    def test_puts_an_adapter_on_every_layer(self, tiny_llama_untied: Path) -> None:
        base = load(tiny_llama_untied, MIXED)
        adapted = attach_adapter(base, LoraSpec(r=4), seed=0)
        kinds = {
            type(adapted.model.get_submodule(f"base_model.model.{name}")).__module__ + "." + kind
            for name in quantized_bits(base.skeleton, MIXED)
            if (kind := type(adapted.model.get_submodule(f"base_model.model.{name}")).__name__)
        }
        assert kinds == {"peft.tuners.lora.bnb.Linear4bit", "peft.tuners.lora.bnb.Linear8bitLt"}
        ids = some_ids()
        losses = [train_a_step(adapted.model, 0.1, ids) for _ in range(3)]
        assert losses[2] < losses[1] < losses[0]
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                assert parameter.abs().sum() > 0, name

    def test_is_refused_in_full_on_what_is_quantized(self, tiny_llama_untied: Path) -> None:
        lora = LoraSpec(modules_to_save=("v_proj",), target_modules=("q_proj",))
        with pytest.raises(AdapterError, match="quantized to 8 bits"):
            load(tiny_llama_untied, QuantizationSpec(overrides={"v_proj": 8}), lora=lora)
        sixteen = QuantizationSpec(overrides={"v_proj": 16})
        load(tiny_llama_untied, sixteen, lora=lora)

    def test_is_tied_to_the_mixture(self, tiny_llama_untied: Path, tmp_path: Path) -> None:
        base = load(tiny_llama_untied, MIXED)
        adapted = attach_adapter(base, LoraSpec(r=4), seed=0)
        shake(adapted.model)
        said = logits(adapted.model)
        save_adapter(adapted.model, base, MIXED, "0" * 64, tmp_path / "adapter")
        again = load(tiny_llama_untied, MIXED)
        reloaded, findings = load_adapter(again, MIXED, tmp_path / "adapter")
        assert not findings
        assert torch.equal(logits(reloaded), said)
        other = load(tiny_llama_untied)
        with pytest.raises(AdapterError, match=r"quantization\.overrides: trained with"):
            load_adapter(other, QuantizationSpec(), tmp_path / "adapter")

    def test_of_adapters_from_before_there_were_mixtures(
        self, tiny_llama_untied: Path, tmp_path: Path
    ) -> None:
        base = load(tiny_llama_untied)
        manifest = manifest_for(base, QuantizationSpec(), "0" * 64, tmp_path)
        del manifest.quantization["overrides"]
        assert differences(manifest, base, QuantizationSpec()) == []


class TestWhatIsSaved:
    @pytest.fixture
    def stored(self, tiny_llama_untied: Path, tmp_path: Path) -> Path:
        base = load(tiny_llama_untied, MIXED)
        base.model.save_pretrained(tmp_path / "stored")
        base.tokenizer.save_pretrained(tmp_path / "stored")
        return tmp_path / "stored"

    def test_comes_back_bit_by_bit(self, tiny_llama_untied: Path, stored: Path) -> None:
        """Numbers, scales and widths; processors with AVX512-BF16 multiply them in bfloat16."""
        base = load(tiny_llama_untied, MIXED)
        wanted = base.model.state_dict()
        reloaded = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
        found = reloaded.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        expected = module_bits(base.skeleton, MIXED)
        assert widths(reloaded, expected) == expected
        assert torch.allclose(logits(reloaded), logits(base.model), atol=0.02)

    def test_is_known_for_what_it_is(self, stored: Path) -> None:
        found = stored_quantization(ModelSpec(name_or_path=str(stored)))
        assert found is not None
        base = load(stored, found)
        assert quantized_bits(base.skeleton, found) == quantized_bits(base.skeleton, MIXED)
        assert torch.equal(logits(load(stored, found).model), logits(load(stored, MIXED).model))
        with pytest.raises(ModelError, match=r"v_proj to 8 bits.*overrides keep it in 4"):
            load(stored)

    def test_is_dequantized(self, stored: Path, tmp_path: Path) -> None:
        result = dequantize_checkpoint(stored, tmp_path / "dense", probe_hardware())
        assert result.passed
        assert result.divergence is not None
        assert result.divergence.kl_mean < 1e-6
        assert result.num_modules == 13, "fourteen linear layers, of which one is in 16 bits"

    def test_counts_its_bytes(self, tiny_llama_untied: Path) -> None:
        base = load(tiny_llama_untied, MIXED)
        lightest = load(tiny_llama_untied).quantized
        found = count_quantized(base.model)
        assert found.num_parameters == lightest.num_parameters
        assert found.num_quantized == lightest.num_quantized - 64 * 128
        assert found.weight_bytes > lightest.weight_bytes


def test_a_stored_four_bit_base_keeps_its_own_widths(tiny_llama: Path, tmp_path: Path) -> None:
    base = load(tiny_llama, QuantizationSpec(skip_modules=("v_proj",)))
    base.model.save_pretrained(tmp_path / "four")
    base.tokenizer.save_pretrained(tmp_path / "four")
    load(tmp_path / "four", QuantizationSpec(overrides={"v_proj": 16}))
    with pytest.raises(ModelError, match=r"down_proj to 4 bits, but .* keep it in 8"):
        load(tmp_path / "four", QuantizationSpec(overrides={"down_proj": 8, "v_proj": 16}))


def test_the_cache_of_quantized_bases_keeps_mixtures(tiny_llama: Path) -> None:
    """What one process leaves there, another reads."""

    def load_it(quantization: QuantizationSpec) -> Base:
        spec = ModelSpec(name_or_path=str(tiny_llama))
        hardware = probe_hardware()
        return load_base(spec, quantization, torch.float32, "a test", hardware, is_shared=True)

    first, again, plain = load_it(MIXED), load_it(MIXED), load_it(QuantizationSpec())
    assert state_checksum(first.model) == state_checksum(again.model)
    assert torch.equal(logits(first.model), logits(again.model))
    expected = module_bits(again.skeleton, MIXED)
    assert widths(again.model, expected) == expected
    assert state_checksum(plain.model) != state_checksum(first.model)
