"""Checkpoints that are stored quantized: their settings hold, and a recipe must agree with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.errors import ModelError
from qlora_kit.model import base as base_module
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.prequantized import prequantized_settings, stored_quantization
from qlora_kit.model.quantized import four_bit_modules, is_quantized
from qlora_kit.model.saved import load_adapter, save_adapter
from qlora_kit.model.skeleton import build_skeleton, load_config
from qlora_kit.model.weight import dequantized_weight
from qlora_kit.recipe import LoraSpec, ModelSpec, QuantizationSpec

from .zoo import load, logits, train_a_step

FOUR = QuantizationSpec()
EIGHT = QuantizationSpec(load_in_8bit=True)
SIXTEEN = QuantizationSpec(load_in_4bit=False)
UP_PROJ = "model.layers.0.mlp.up_proj"

NF4: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float16,
}
STORED: dict[str, tuple[dict[str, Any], QuantizationSpec]] = {
    "nf4": (NF4, FOUR),
    "upstream's defaults": (
        {"load_in_4bit": True},
        QuantizationSpec(quant_type="fp4", double_quant=False),
    ),
    "stored in bfloat16": (
        {**NF4, "bnb_4bit_quant_storage": torch.bfloat16},
        QuantizationSpec(quant_storage="bfloat16"),
    ),
    "with skips": (
        {**NF4, "llm_int8_skip_modules": ["lm_head", "k_proj"]},
        QuantizationSpec(skip_modules=("lm_head", "k_proj")),
    ),
    "int8": ({"load_in_8bit": True}, EIGHT),
    "int8, another threshold": (
        {"load_in_8bit": True, "llm_int8_threshold": 3.5},
        QuantizationSpec(load_in_8bit=True, int8_threshold=3.5),
    ),
}


def store(folder: Path, to: Path, settings: dict[str, Any]) -> Path:
    """As anybody would: transformers alone."""
    build_tokenizer(to)
    config = BitsAndBytesConfig(**settings)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_llama_untied: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stored")
    return {
        name: store(tiny_llama_untied, root / str(number), settings)
        for number, (name, (settings, _)) in enumerate(STORED.items())
    }


@pytest.fixture
def nf4(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folders["nf4"], tmp_path / "nf4"))


def change_config(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scan_weights", "load_model"):
        monkeypatch.setattr(base_module, name, lambda *_: pytest.fail("the weights were read"))


@pytest.mark.parametrize("name", STORED)
class TestEachKind:
    def test_is_the_model_that_quantizing_here_gives(
        self, folders: dict[str, Path], tiny_llama_untied: Path, name: str
    ) -> None:
        spec = STORED[name][1]
        stored, ours = load(folders[name], spec), load(tiny_llama_untied, spec)
        assert stored.quantized == ours.quantized
        assert stored.quantized.num_quantized > 0
        torch.testing.assert_close(logits(stored.model), logits(ours.model), rtol=0, atol=0)
        weights = [dequantized_weight(base.model.get_submodule(UP_PROJ)) for base in (stored, ours)]
        torch.testing.assert_close(*weights, rtol=0, atol=0)

    def test_says_how_it_was_stored(self, folders: dict[str, Path], name: str) -> None:
        spec = ModelSpec(name_or_path=str(folders[name]))
        assert stored_quantization(spec) == STORED[name][1]

    def test_trains_and_its_adapter_comes_back(
        self, folders: dict[str, Path], tmp_path: Path, name: str
    ) -> None:
        quantization, lora = STORED[name][1], LoraSpec(r=4)
        base = load(folders[name], quantization, lora=lora)
        model = attach_adapter(base, lora, 0).model
        assert train_a_step(model, 0.1) > train_a_step(model, 0.1)
        tuned = logits(model)
        save_adapter(model, base, quantization, "0" * 64, tmp_path / "adapter")
        again = load(folders[name], quantization, adapter=tmp_path / "adapter")
        back, findings = load_adapter(again, quantization, tmp_path / "adapter")
        assert findings == []
        torch.testing.assert_close(logits(back), tuned, rtol=0, atol=0)


class TestFourBits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compute_in_what_we_say(self, folders: dict[str, Path], dtype: torch.dtype) -> None:
        """There and back; the checkpoint says float16."""
        model = load(folders["nf4"], dtype=dtype).model
        modules = list(four_bit_modules(model))
        assert len(modules) == 14
        assert {module.compute_dtype for module in modules} == {dtype}
        assert {module.weight.quant_state.dtype for module in modules} == {dtype}
        rows = torch.randn(3, 64, dtype=dtype, requires_grad=True)
        product = model.get_submodule(UP_PROJ)(rows)
        assert product.dtype == dtype
        weight = dequantized_weight(model.get_submodule(UP_PROJ)).to(dtype)
        (gradient,) = torch.autograd.grad(product, rows, torch.ones_like(product))
        torch.testing.assert_close(gradient, torch.ones_like(product) @ weight)

    def test_bring_no_warning_of_settings_that_upstream_passes_over(
        self, folders: dict[str, Path], recwarn: pytest.WarningsRecorder
    ) -> None:
        load(folders["nf4"])
        assert [one for one in recwarn if "quantization_config" in str(one.message)] == []

    def test_upstream_still_computes_in_what_was_stored(self, folders: dict[str, Path]) -> None:
        """Why it is set here; when this fails, upstream has mended it."""
        model = AutoModelForCausalLM.from_pretrained(
            folders["nf4"],
            dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32
            ),
        )
        assert {module.compute_dtype for module in four_bit_modules(model)} == {torch.float16}

    def test_keep_the_kind_that_they_were_stored_in(self, folders: dict[str, Path]) -> None:
        for name, kind in (("nf4", ("nf4", True)), ("upstream's defaults", ("fp4", False))):
            modules = four_bit_modules(load(folders[name], STORED[name][1]).model)
            states = [module.weight.quant_state for module in modules]
            assert {(state.quant_type, state.nested) for state in states} == {kind}

    def test_leave_out_what_was_left_out(self, folders: dict[str, Path]) -> None:
        """Unnamed in the recipe, it is no linear layer that was missed."""
        model = load(folders["with skips"]).model
        assert not is_quantized(model.get_submodule("model.layers.0.self_attn.k_proj"))
        assert not is_quantized(model.lm_head)
        assert is_quantized(model.get_submodule("model.layers.0.self_attn.q_proj"))


class TestEightBits:
    def test_keep_their_threshold(self, folders: dict[str, Path]) -> None:
        name = "int8, another threshold"
        model = load(folders[name], STORED[name][1]).model
        packed: list[Any] = [module for module in model.modules() if is_quantized(module)]
        assert len(packed) == 14
        assert {module.state.threshold for module in packed} == {3.5}
        assert {module.weight.dtype for module in packed} == {torch.int8}


CONTRADICTIONS: dict[str, tuple[str, QuantizationSpec, str]] = {
    "8 for 4": ("nf4", EIGHT, "to 4 bits, but the recipe asks for 8; set quantization.load_in_4"),
    "16 for 4": ("nf4", SIXTEEN, "to 4 bits, but the recipe asks for 16"),
    "4 for 8": ("int8", FOUR, "to 8 bits, but the recipe asks for 4; set quantization.load_in_8"),
    "16 for 8": ("int8", SIXTEEN, "to 8 bits, but the recipe asks for 16"),
    "kind": (
        "nf4",
        QuantizationSpec(quant_type="fp4"),
        "quant_type: nf4, but the recipe says fp4; set quantization.quant_type: nf4",
    ),
    "double": (
        "nf4",
        QuantizationSpec(double_quant=False),
        "double_quant: true, but the recipe says false; set quantization.double_quant: true",
    ),
    "storage": (
        "stored in bfloat16",
        FOUR,
        "quant_storage: bfloat16, but the recipe says uint8; set quantization.quant_storage: bfl",
    ),
    "threshold": (
        "int8, another threshold",
        EIGHT,
        "int8_threshold: 3.5, but the recipe says 6.0; set quantization.int8_threshold: 3.5",
    ),
    "skips": (
        "nf4",
        QuantizationSpec(skip_modules=("up_proj",)),
        "without regard to quantization.skip_modules: up_proj; remove it",
    ),
    "more skips": (
        "with skips",
        QuantizationSpec(skip_modules=("k_proj", "up_proj")),
        "without regard to quantization.skip_modules: up_proj; remove it",
    ),
}


class TestARecipeThatSaysOtherwise:
    @pytest.mark.parametrize("name", CONTRADICTIONS)
    def test_is_refused_before_weights_are_read(
        self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """Upstream would go by the checkpoint, with a warning."""
        kind, quantization, words = CONTRADICTIONS[name]
        nothing_is_read(monkeypatch)
        with pytest.raises(ModelError) as caught:
            load(folders[kind], quantization)
        assert f"{folders[kind]} is already quantized" in str(caught.value)
        assert words in str(caught.value)

    @pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
    def test_about_the_method(self, nf4: Path, method: str) -> None:
        change_config(nf4, quantization_config={"quant_method": method, "bits": 4})
        with pytest.raises(ModelError, match=f"already quantized with {method}, which cannot be"):
            load(nf4)
        assert stored_quantization(ModelSpec(name_or_path=str(nf4))) is None


class TestWhatAConfigSays:
    def test_of_a_plain_checkpoint_is_nothing(self, tiny_llama: Path) -> None:
        assert prequantized_settings(build_skeleton(load_config(tiny_llama))) is None
        assert stored_quantization(ModelSpec(name_or_path=str(tiny_llama))) is None

    def test_may_leave_the_method_out(self, nf4: Path, folders: dict[str, Path]) -> None:
        """As until 2023, when there was only one; upstream reads it still."""
        settings = settings_of(nf4)
        del settings["quant_method"], settings["_load_in_4bit"], settings["_load_in_8bit"]
        change_config(nf4, quantization_config=settings)
        assert stored_quantization(ModelSpec(name_or_path=str(nf4))) == FOUR
        torch.testing.assert_close(
            logits(load(nf4).model), logits(load(folders["nf4"]).model), rtol=0, atol=0
        )

    def test_where_it_says_little_stands_for_upstream_s_defaults(self, nf4: Path) -> None:
        spec = ModelSpec(name_or_path=str(nf4))
        change_config(nf4, quantization_config={"load_in_4bit": True})
        assert stored_quantization(spec) == STORED["upstream's defaults"][1]
        change_config(nf4, quantization_config={"load_in_8bit": True})
        assert stored_quantization(spec) == EIGHT

    @pytest.mark.parametrize(
        ("said", "quantization"),
        [
            ({"bnb_4bit_quant_type": "fp4"}, QuantizationSpec(quant_type="fp4")),
            ({"bnb_4bit_use_double_quant": False}, QuantizationSpec(double_quant=False)),
        ],
    )
    def test_must_be_true_of_the_tensors(
        self, nf4: Path, said: dict[str, Any], quantization: QuantizationSpec
    ) -> None:
        """Upstream reads the tensors, and an adapter's record would be of the config."""
        change_config(nf4, quantization_config={**settings_of(nf4), **said})
        with pytest.raises(ModelError, match="was loaded as nf4 with double quantization, and con"):
            load(nf4, quantization)

    def test_must_be_of_these_shapes(self, nf4: Path) -> None:
        change_config(nf4, intermediate_size=192)
        with pytest.raises(ModelError, match=r"in shape \[128, 64\].*describes \[192, 64\]"):
            load(nf4)


class TestADamagedCheckpoint:
    PARTS = (
        "",
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
        ".quant_state.bitsandbytes__nf4",
    )

    @pytest.mark.parametrize("part", PARTS)
    def test_lacks_a_part_of_a_layer(self, nf4: Path, part: str) -> None:
        """Without `nested_absmax` upstream takes quantized scales for scales, and says nothing."""
        values = load_file(nf4 / "model.safetensors")
        parts = {name.removeprefix(f"{UP_PROJ}.weight") for name in values if UP_PROJ in name}
        assert parts == set(self.PARTS)
        del values[f"{UP_PROJ}.weight{part}"]
        save_file(values, nf4 / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError):
            load(nf4)

    def test_lacks_a_norm(self, nf4: Path) -> None:
        values = load_file(nf4 / "model.safetensors")
        del values["model.norm.weight"]
        save_file(values, nf4 / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=r"no weights for model\.norm\.weight"):
            load(nf4)

    def test_has_scales_that_are_not_finite(self, nf4: Path) -> None:
        values = load_file(nf4 / "model.safetensors")
        values[f"{UP_PROJ}.weight.nested_absmax"][0] = float("nan")
        save_file(values, nf4 / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=r"up_proj\.weight\.nested_absmax: holds NaN"):
            load(nf4)

    def test_in_eight_bits_lacks_its_scales(self, folders: dict[str, Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(folders["int8"], tmp_path / "int8"))
        values = load_file(folder / "model.safetensors")
        del values[f"{UP_PROJ}.SCB"]
        save_file(values, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match="cannot be loaded"):
            load(folder, EIGHT)
