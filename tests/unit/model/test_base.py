"""The frozen base: what is quantized and how, in which dtype it computes, what loading refuses."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conftest import build_llama
from peft import prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from qlora_kit.errors import ModelError
from qlora_kit.model import base as base_module
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.base import bitsandbytes_config, prepare_for_training, upcasts_norms
from qlora_kit.model.quantized import four_bit_modules, is_quantized
from qlora_kit.model.skeleton import build_skeleton, load_config
from qlora_kit.model.weight import dequantized_weight
from qlora_kit.recipe import LoraSpec, ModelSpec, QuantizationSpec

from .zoo import DENSE, MIXTURES, build, load, logits, some_ids, train_a_step

EIGHT = QuantizationSpec(load_in_8bit=True)
SIXTEEN = QuantizationSpec(load_in_4bit=False)


def num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def change_weights(folder: Path, **changed: torch.Tensor | None) -> Path:
    """Replace tensors, or remove those that are None."""
    path = folder / "model.safetensors"
    values = {**load_file(path), **changed}
    kept = {name: value for name, value in values.items() if value is not None}
    save_file(kept, path, {"format": "pt"})
    return folder


class TestFourBits:
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("double_quant", [True, False])
    def test_each_kind_is_what_was_asked_and_trains(
        self, tiny_llama: Path, quant_type: str, double_quant: bool
    ) -> None:
        quantization = QuantizationSpec(quant_type=quant_type, double_quant=double_quant)
        base = load(tiny_llama, quantization)
        states = [module.weight.quant_state for module in four_bit_modules(base.model)]
        assert len(states) == 14
        assert {(state.quant_type, state.nested) for state in states} == {
            (quant_type, double_quant)
        }
        model = attach_adapter(base, LoraSpec(r=4), 0).model
        assert train_a_step(model) > train_a_step(model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_forward_and_backward_use_the_same_weights(
        self, tiny_llama: Path, dtype: torch.dtype
    ) -> None:
        """Upstream dequantizes in the compute dtype on the way there, in the state's on the way
        back; loaded in another dtype, the two differ.
        """
        module = next(four_bit_modules(load(tiny_llama, dtype=dtype).model))
        assert module.weight.quant_state.dtype == module.compute_dtype == dtype
        identity = torch.eye(64, dtype=dtype, requires_grad=True)
        there = module(identity).detach()
        rows = torch.eye(64, dtype=dtype)
        (back,) = torch.autograd.grad(module(identity), identity, rows)
        used = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert used.dtype == dtype
        torch.testing.assert_close(there.T, used, rtol=0, atol=0)
        torch.testing.assert_close(back, used, rtol=0, atol=0)

    def test_weights_load_in_the_compute_dtype(self, tiny_llama: Path) -> None:
        base = load(tiny_llama, dtype=torch.bfloat16)
        assert base.model.get_input_embeddings().weight.dtype == torch.bfloat16
        assert base.model.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16

    def test_storage_can_be_what_sharding_needs(self, tiny_llama: Path) -> None:
        stored = load(tiny_llama, QuantizationSpec(quant_storage="bfloat16"), torch.bfloat16)
        plain = load(tiny_llama, dtype=torch.bfloat16)
        weights = [module.weight for module in four_bit_modules(stored.model)]
        assert {weight.dtype for weight in weights} == {torch.bfloat16}
        assert stored.quantized.num_quantized == plain.quantized.num_quantized
        assert stored.quantized.weight_bytes == plain.quantized.weight_bytes
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(logits(stored.model), logits(plain.model), rtol=0, atol=0)

    @pytest.mark.parametrize(("double_quant", "bits"), [(True, 4.127), (False, 4.5)])
    def test_bits_per_parameter(self, tmp_path: Path, double_quant: bool, bits: float) -> None:
        """4 bits, and a scale of 32 or of 8 bits for each 64 numbers."""
        folder = build_llama(tmp_path, hidden_size=256, intermediate_size=1024)
        base = load(folder, QuantizationSpec(double_quant=double_quant))
        packed = [module.weight for module in four_bit_modules(base.model)]
        rest = sum(
            num_bytes(value)
            for value in base.model.parameters()
            if all(value is not weight for weight in packed)
        )
        codes = len(packed) * (16 + 256 * double_quant) * 4 + len(packed) * 4 * double_quant
        quantized_bytes = base.quantized.weight_bytes - rest - codes
        # Norms were loaded in 4 bytes per number already: this is float32.
        assert 8 * quantized_bytes / base.quantized.num_quantized == pytest.approx(bits, abs=2e-3)

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of maps")
    def test_the_checkpoint_does_not_stay_in_memory(self, tmp_path: Path) -> None:
        """For the sake of the embeddings, in the dtype in which they are stored."""
        folder = build_llama(tmp_path / "stored")
        base = load(folder, QuantizationSpec())
        assert str(folder / "model.safetensors") not in Path("/proc/self/maps").read_text()
        assert base.model.get_input_embeddings().weight.dtype == torch.float32

    def test_packing_for_other_processors_is_off(self, tiny_llama: Path) -> None:
        """It happens in evaluation, and nothing undoes it before the next training step."""
        modules = list(four_bit_modules(load(tiny_llama).model))
        assert modules
        assert not any(module.support_avx512bf16_for_cpu for module in modules)


class TestEightBits:
    def test_it_loads_and_trains(self, tiny_llama: Path) -> None:
        base = load(tiny_llama, EIGHT)
        packed = [module for module in base.model.modules() if is_quantized(module)]
        assert len(packed) == 14
        assert {module.weight.dtype for module in packed} == {torch.int8}
        model = attach_adapter(base, LoraSpec(r=4), 0).model
        assert train_a_step(model) > train_a_step(model)

    def test_its_threshold_arrives(self, tiny_llama: Path) -> None:
        quantization = QuantizationSpec(load_in_8bit=True, int8_threshold=3.5)
        base = load(tiny_llama, quantization)
        packed = [module for module in base.model.modules() if is_quantized(module)]
        assert {module.state.threshold for module in packed} == {3.5}

    def test_skips_are_united_with_the_library_s(self, tiny_llama_untied: Path) -> None:
        base = load(
            tiny_llama_untied, QuantizationSpec(load_in_8bit=True, skip_modules=("k_proj",))
        )
        assert not is_quantized(base.model.lm_head)
        kinds = {name.split(".")[-1] for name, m in base.model.named_modules() if is_quantized(m)}
        assert kinds == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    def test_dequantized_weights_are_those_that_it_multiplies_with(self, tiny_llama: Path) -> None:
        base = load(tiny_llama, EIGHT)
        module = base.model.model.layers[0].mlp.up_proj
        before = dequantized_weight(module)
        module.train()
        product = module(torch.eye(64))
        torch.testing.assert_close(product.T, before, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(dequantized_weight(module), before, rtol=0, atol=0)


class TestSixteenBits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nothing_is_quantized(self, tiny_llama: Path, dtype: torch.dtype) -> None:
        base = load(tiny_llama, SIXTEEN, dtype)
        assert base.quantized.num_quantized == 0
        assert base.quantized.share == 0.0
        assert base.model.model.layers[0].mlp.up_proj.weight.dtype == dtype
        assert getattr(base.model.config, "quantization_config", None) is None

    def test_mixtures_pass(self, tmp_path: Path) -> None:
        folder = build(tmp_path, *MIXTURES["mixtral"])
        assert load(folder, SIXTEEN).quantized.num_quantized == 0


class TestSkips:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_skip_of_one_s_own_keeps_the_head_unquantized(
        self, tiny_llama: Path, tiny_llama_untied: Path, tied: bool, bits: int
    ) -> None:
        """Given to the library alone, it would turn the library's list off."""
        folder = tiny_llama if tied else tiny_llama_untied
        quantization = QuantizationSpec(load_in_8bit=bits == 8, skip_modules=("gate_proj",))
        base = load(folder, quantization)
        assert not is_quantized(base.model.lm_head)
        is_tied = base.model.lm_head.weight is base.model.get_input_embeddings().weight
        assert is_tied == tied
        assert not is_quantized(base.model.model.layers[1].mlp.gate_proj)
        assert is_quantized(base.model.model.layers[1].mlp.up_proj)
        assert torch.isfinite(logits(base.model)).all()

    def test_whole_layers_can_be_skipped(self, tiny_llama: Path) -> None:
        base = load(tiny_llama, QuantizationSpec(skip_modules=("model.layers.0",)))
        names = [name for name, module in base.model.named_modules() if is_quantized(module)]
        assert len(names) == 7
        assert all(name.startswith("model.layers.1.") for name in names)

    @pytest.mark.parametrize("skip", ["nonsense", "mlp", "norm"])
    def test_a_skip_that_skips_nothing_is_refused(self, tiny_llama: Path, skip: str) -> None:
        with pytest.raises(ModelError, match=rf"quantization.skip_modules: {skip} is neither"):
            load(tiny_llama, QuantizationSpec(skip_modules=("q_proj", skip)))

    def test_upstream_still_drops_its_list_for_one_s_own(self, tiny_llama_untied: Path) -> None:
        """Why the lists are united here; when this fails, upstream has mended it."""
        from transformers import AutoModelForCausalLM

        alone = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["gate_proj"])
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_untied, quantization_config=alone)
        assert is_quantized(model.lm_head)


class TestTheOneConfig:
    def test_every_setting_arrives(self, tiny_llama: Path) -> None:
        """Upstream takes misspelt settings without a word, and its own defaults are FP4."""
        skeleton = build_skeleton(load_config(tiny_llama))
        spec = QuantizationSpec(quant_storage="float16", skip_modules=("k_proj",))
        config = bitsandbytes_config(spec, skeleton, torch.bfloat16)
        assert config is not None
        assert config.load_in_4bit
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
        assert config.bnb_4bit_compute_dtype == torch.bfloat16
        assert config.bnb_4bit_quant_storage == torch.float16
        assert set(config.llm_int8_skip_modules) == {"k_proj", "lm_head", "model.embed_tokens"} | (
            {"model.norm"}
        )
        assert bitsandbytes_config(SIXTEEN, skeleton, torch.bfloat16) is None
        eight = bitsandbytes_config(
            QuantizationSpec(load_in_8bit=True, int8_threshold=2.0), skeleton, torch.float32
        )
        assert eight is not None
        assert (eight.load_in_8bit, eight.llm_int8_threshold) == (True, 2.0)


class TestPreparation:
    def sizes(self, model: torch.nn.Module) -> dict[str, int]:
        return {name: num_bytes(value) for name, value in model.named_parameters()}

    @pytest.mark.parametrize(
        "name", ["llama, tied", "gpt2: Conv1D, tied", "gemma2: soft caps", "cohere", "mpt"]
    )
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_norms_grow_and_nothing_else_does(
        self, tmp_path: Path, name: str, dtype: torch.dtype
    ) -> None:
        folder = build(tmp_path, *DENSE[name])
        fresh = base_module.load_base(
            ModelSpec(name_or_path=str(folder)), QuantizationSpec(), dtype, "", hardware()
        ).model
        before = self.sizes(fresh)
        prepare_for_training(fresh, upcast_norms=False)
        assert self.sizes(fresh) == before
        prepare_for_training(fresh, upcast_norms=True)
        after = self.sizes(fresh)
        grown = {name for name in before if after[name] != before[name]}
        norms = {name for name in before if "norm" in name or re.search(r"\bln_", name)}
        assert grown == norms != set()
        assert all(after[name] == 2 * before[name] for name in grown)
        assert fresh.get_input_embeddings().weight.dtype == dtype
        assert not any(value.requires_grad for value in fresh.parameters())

    @pytest.mark.parametrize(
        ("asked", "dtype", "expected"),
        [
            ("auto", torch.bfloat16, False),
            ("auto", torch.float16, True),
            (True, torch.bfloat16, True),
            (False, torch.float16, False),
        ],
    )
    def test_norms_are_wide_where_the_range_is_narrow_or_it_is_asked_for(
        self, asked: bool | str, dtype: torch.dtype, expected: bool
    ) -> None:
        spec = QuantizationSpec.model_validate({"upcast_norms": asked})
        assert upcasts_norms(spec, dtype) is expected

    def test_upstream_s_blanket_upcast_inflates_the_embeddings(self, tiny_llama: Path) -> None:
        """Why there is a preparation of our own."""
        model = load(tiny_llama, dtype=torch.bfloat16).model
        ours = sum(self.sizes(model).values())
        theirs = sum(self.sizes(prepare_model_for_kbit_training(model)).values())
        assert theirs >= ours + num_bytes(torch.zeros(384, 64, dtype=torch.bfloat16))

    def test_experts_are_not_inflated(self, tmp_path: Path) -> None:
        folder = build(tmp_path, *MIXTURES["mixtral"])
        model = load(folder, SIXTEEN, torch.bfloat16).model
        assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
        assert model.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16

    @pytest.mark.parametrize("quantization", [QuantizationSpec(), SIXTEEN], ids=["4", "16"])
    def test_bf16_trains_under_autocast_with_float32_norms_and_adapters(
        self, tiny_llama_untied: Path, quantization: QuantizationSpec
    ) -> None:
        base = load(tiny_llama_untied, quantization, torch.bfloat16)
        model = attach_adapter(base, LoraSpec(r=4), 0).model
        losses = []
        for _ in range(8):  # one context each: it keeps its casts of the weights
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(train_a_step(model))
        assert losses[-1] < losses[0] - 0.1
        assert all(torch.isfinite(torch.tensor(losses)))
        ids = some_ids()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        gradients = [value.grad for value in model.parameters() if value.requires_grad]
        assert gradients
        assert {grad.dtype for grad in gradients if grad is not None} == {torch.float32}
        assert all(grad is not None and torch.isfinite(grad).all() for grad in gradients)

    def test_bf16_is_close_to_float32(self, tiny_llama: Path) -> None:
        exact = logits(load(tiny_llama).model)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = logits(load(tiny_llama, dtype=torch.bfloat16).model)
        assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


def hardware() -> Any:
    from qlora_kit.environment import probe_hardware

    return probe_hardware()


class TestWhatIsRefused:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize(
        "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
    )
    def test_weights_that_are_not_finite(
        self, tmp_path: Path, tiny_llama_untied: Path, name: str, value: float
    ) -> None:
        """One of them would spread over 64 × 64 numbers under double quantization."""
        folder = copy_of(tiny_llama_untied, tmp_path / "m")
        tensor = load_file(folder / "model.safetensors")[name]
        tensor.view(-1)[5] = value
        change_weights(folder, **{name: tensor})
        with pytest.raises(ModelError, match=f"{name}: holds NaN or infinity"):
            load(folder)

    def test_a_missing_tensor(self, tmp_path: Path, tiny_llama_untied: Path) -> None:
        """transformers fills it with random numbers."""
        folder = copy_of(tiny_llama_untied, tmp_path / "m")
        change_weights(folder, **{"model.layers.1.mlp.up_proj.weight": None})
        with pytest.raises(ModelError, match=r"no weights for model\.layers\.1\.mlp\.up_proj"):
            load(folder)

    def test_a_model_without_its_head(self, tmp_path: Path, tiny_llama_untied: Path) -> None:
        folder = copy_of(tiny_llama_untied, tmp_path / "m")
        change_weights(folder, **{"lm_head.weight": None})
        with pytest.raises(ModelError, match=r"lm_head\.weight .*another purpose"):
            load(folder)

    @pytest.mark.parametrize("quantization", [QuantizationSpec(), EIGHT, SIXTEEN])
    def test_a_tensor_of_another_shape(
        self, tmp_path: Path, tiny_llama_untied: Path, quantization: QuantizationSpec
    ) -> None:
        """transformers takes it when it quantizes."""
        folder = copy_of(tiny_llama_untied, tmp_path / "m")
        change_weights(folder, **{"model.layers.1.mlp.up_proj.weight": torch.ones(10, 64)})
        with pytest.raises(ModelError, match=r"up_proj\.weight in shape \[10, 64\].*\[128, 64\]"):
            load(folder, quantization)

    def test_a_tokenizer_that_knows_more_than_the_model_embeds(
        self, tmp_path: Path, tiny_llama: Path
    ) -> None:
        folder = build_llama(tmp_path / "small", vocab_size=128)
        with pytest.raises(ModelError, match="but the model embeds only 128"):
            load(folder)
        own = load(tiny_llama, tokenizer_name_or_path=str(folder))
        assert len(own.tokenizer) < 384

    def test_an_attention_that_is_not_installed(self, tiny_llama: Path) -> None:
        with pytest.raises(ModelError, match=r"cannot be loaded: .*[Ff]lash"):
            load(tiny_llama, attn_implementation="flash_attention_2")

    def test_attention_is_what_was_asked(self, tiny_llama: Path) -> None:
        eager = load(tiny_llama, attn_implementation="eager").model
        assert eager.config._attn_implementation == "eager"
        torch.testing.assert_close(
            logits(eager), logits(load(tiny_llama).model), rtol=1e-4, atol=1e-5
        )

    def test_an_incomplete_mixture_that_loading_fuses(self, tmp_path: Path) -> None:
        """Its tensors are stored one by one, so only loading finds out."""
        folder = build(tmp_path, *MIXTURES["mixtral"])
        names = load_file(folder / "model.safetensors")
        assert any("experts.1.w1" in name for name in names), "they are fused on the disk too"
        missing = {name: None for name in names if ".experts." in name and ".w2." in name}
        change_weights(folder, **missing)
        with pytest.raises(ModelError, match=r"no weights for .*down_proj"):
            load(folder, SIXTEEN)


class TestPickles:
    @pytest.fixture
    def pickled(self, tmp_path: Path, tiny_llama_untied: Path) -> Path:
        folder = copy_of(tiny_llama_untied, tmp_path / "m")
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        return folder

    def test_are_refused_unless_asked_for(self, pickled: Path) -> None:
        with pytest.raises(ModelError, match=r"pickles \(pytorch_model.bin\).*allow_pickle: true"):
            load(pickled)

    def test_load_to_the_same_model_when_asked_for(
        self, pickled: Path, tiny_llama_untied: Path
    ) -> None:
        base, same = load(pickled, allow_pickle=True), load(tiny_llama_untied)
        assert base.fingerprint == same.fingerprint
        torch.testing.assert_close(logits(base.model), logits(same.model), rtol=0, atol=0)

    def test_of_another_shape_are_refused_too(self, pickled: Path) -> None:
        path = pickled / "pytorch_model.bin"
        values = torch.load(path, weights_only=True)
        values["model.layers.1.mlp.up_proj.weight"] = torch.ones(10, 64)
        torch.save(values, path)
        with pytest.raises(ModelError, match=r"up_proj was loaded in shape \[10, 64\]"):
            load(pickled, allow_pickle=True)


class TestCodeThatShipsWithAModel:
    @pytest.fixture
    def folder(self, tmp_path: Path, tiny_llama: Path) -> Path:
        """A model of a type that only its own code knows; the code leaves a mark when it runs."""
        folder = copy_of(tiny_llama, tmp_path / "m")
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "own_type",
            "auto_map": {
                "AutoConfig": "own.OwnConfig",
                "AutoModelForCausalLM": "own.OwnModel",
            },
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text(
            "from pathlib import Path\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            f"Path({str(tmp_path / 'ran')!r}).touch()\n"
            "class OwnConfig(LlamaConfig):\n    model_type = 'own_type'\n"
            "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        )
        return folder

    def test_does_not_run_unasked(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"own Python code.*model.trust_remote_code: true"):
            load(folder)
        assert not (tmp_path / "ran").exists()

    def test_runs_when_asked_for(
        self, folder: Path, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import dynamic_module_utils

        monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        base = load(folder, trust_remote_code=True)
        assert (tmp_path / "ran").exists()
        assert type(base.model).__name__ == "OwnModel"
        torch.testing.assert_close(
            logits(base.model), logits(load(tiny_llama).model), rtol=0, atol=0
        )

    def test_of_a_tokenizer_does_not_run_unasked_either(
        self, tmp_path: Path, tiny_llama: Path
    ) -> None:
        folder = copy_of(tiny_llama, tmp_path / "m")
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config |= {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
        }
        path.write_text(json.dumps(config))
        (folder / "own.py").write_text(
            f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        )
        with pytest.raises(ModelError, match=r"tokenizer .* own Python code.*trust_remote_code"):
            load(folder)
        assert not (tmp_path / "ran").exists()


class TestTheNetwork:
    def test_is_left_alone_where_everything_is_local(
        self, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With no word of being offline: the hub library is told that it may, and does not."""
        import huggingface_hub.constants

        from qlora_kit.model.saved import load_adapter, save_adapter

        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

        def refuse(*_: object) -> None:
            pytest.fail("a connection was opened")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket.socket, "connect_ex", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        lora = LoraSpec(r=4, new_tokens=("<new>",))
        base = load(tiny_llama, lora=lora)
        model = attach_adapter(base, lora, 0).model
        train_a_step(model)
        save_adapter(model, base, QuantizationSpec(), "0" * 64, tmp_path / "adapter")
        again = load(tiny_llama, adapter=tmp_path / "adapter")
        load_adapter(again, QuantizationSpec(), tmp_path / "adapter")
