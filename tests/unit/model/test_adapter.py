"""The adapter: what it trains and in which dtype, how it scales and starts, how it comes back."""

from __future__ import annotations

import math
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import build_llama
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from qlora_kit.errors import AdapterError
from qlora_kit.model.adapter import Adapted, attach_adapter, require_float32_trainables
from qlora_kit.model.base import Base
from qlora_kit.model.saved import load_adapter, save_adapter
from qlora_kit.model.weight import dequantized_weight
from qlora_kit.recipe import LoraSpec, QuantizationSpec

from .zoo import load, logits, shake, some_ids, train_a_step

FOUR = QuantizationSpec()
EIGHT = QuantizationSpec(load_in_8bit=True)
SIXTEEN = QuantizationSpec(load_in_4bit=False)

HIDDEN, INNER, VALUES, VOCABULARY, LAYERS = 64, 128, 32, 384, 2
# Of the tiny Llamas: kind → (outputs, inputs).
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (VALUES, HIDDEN),
    "v_proj": (VALUES, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}
EMBEDDING = VOCABULARY * HIDDEN
BASE = (
    EMBEDDING
    + LAYERS * (sum(outputs * inputs for outputs, inputs in SHAPES.values()) + 2 * HIDDEN)
    + HIDDEN
)
RANK_4 = LAYERS * 4 * sum(outputs + inputs for outputs, inputs in SHAPES.values())


def attached(
    folder: Path,
    quantization: QuantizationSpec = FOUR,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    **lora: Any,
) -> Adapted:
    return attach_adapter(*loaded(folder, quantization, dtype, **lora), seed)


def loaded(
    folder: Path,
    quantization: QuantizationSpec = FOUR,
    dtype: torch.dtype = torch.float32,
    **lora: Any,
) -> tuple[Base, LoraSpec]:
    spec = LoraSpec(**{"r": 4, **lora})
    return load(folder, quantization, dtype, lora=spec), spec


def there_and_back(
    model: PeftModel, base: Base, quantization: QuantizationSpec, folder: Path
) -> PeftModel:
    """The adapter on a fresh base, from what `model` saved."""
    save_adapter(model, base, quantization, "0" * 64, folder)
    again = load(
        Path(base.source.name), quantization, base.compute_dtype or torch.float32, adapter=folder
    )
    return load_adapter(again, quantization, folder)[0]


def layers_of(model: torch.nn.Module) -> dict[str, Any]:
    """Modules with an adapter by what follows `layers.`; what is outside, by its whole name."""
    return {
        name.partition("layers.")[2] or name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if not value.requires_grad
    }


class TestCounts:
    @pytest.mark.parametrize("quantization", [FOUR, EIGHT, SIXTEEN], ids=["4", "8", "16"])
    def test_are_true_whatever_the_base_is_kept_in(
        self, tiny_llama: Path, quantization: QuantizationSpec
    ) -> None:
        """Packed weights hold two parameters in a byte, and count as two."""
        adapted = attached(tiny_llama, quantization)
        assert adapted.num_trainable == RANK_4
        assert adapted.num_parameters == BASE + RANK_4
        assert adapted.targets == dict.fromkeys(SHAPES, LAYERS)

    @pytest.mark.parametrize(
        ("lora", "num_more"),
        [
            ({"use_dora": True}, LAYERS * sum(outputs for outputs, _ in SHAPES.values())),
            ({"modules_to_save": ("lm_head",)}, EMBEDDING),
            ({"modules_to_save": ("norm",)}, HIDDEN),
            ({"new_tokens": ("<a>", "<b>", "<c>")}, 2 * 3 * HIDDEN),
            ({"target_modules": (*SHAPES, "lm_head")}, 4 * (VOCABULARY + HIDDEN)),
            ({"target_modules": (*SHAPES, "embed_tokens")}, 4 * (VOCABULARY + HIDDEN)),
            ({"rank_pattern": {"up_proj": 6}}, LAYERS * 2 * (INNER + HIDDEN)),
        ],
    )
    def test_hold_what_is_trained_besides(
        self, tiny_llama_untied: Path, lora: dict[str, Any], num_more: int
    ) -> None:
        adapted = attached(tiny_llama_untied, **lora)
        assert adapted.num_trainable == RANK_4 + num_more
        assert adapted.num_parameters == BASE + EMBEDDING + RANK_4 + num_more

    def test_of_tied_embeddings_hold_new_rows_once(self, tiny_llama: Path) -> None:
        adapted = attached(tiny_llama, new_tokens=("<a>", "<b>"))
        assert adapted.num_trainable == RANK_4 + 2 * HIDDEN
        assert adapted.num_parameters == BASE + RANK_4 + 2 * HIDDEN

    def test_kinds_are_those_that_carry_an_adapter(self, tiny_llama: Path) -> None:
        adapted = attached(tiny_llama, target_modules=r".*\.(0\.self_attn\.q|1\.mlp\.up)_proj")
        assert adapted.targets == {"q_proj": 1, "up_proj": 1}
        assert set(layers_of(adapted.model)) == {"0.self_attn.q_proj", "1.mlp.up_proj"}


class TestPrecision:
    @pytest.mark.parametrize(
        "lora",
        [
            {},
            {"use_dora": True},
            {"modules_to_save": ("lm_head", "norm")},
            {"new_tokens": ("<a>",)},
            {"init": "loftq"},
            {"target_modules": ("q_proj", "embed_tokens")},
        ],
        ids=str,
    )
    def test_trainables_are_float32_on_a_base_in_16_bits(
        self, tiny_llama_untied: Path, lora: dict[str, Any]
    ) -> None:
        model = attached(tiny_llama_untied, dtype=torch.bfloat16, **lora).model
        assert {value.dtype for value in trainable(model).values()} == {torch.float32}
        require_float32_trainables(model)

    def test_the_base_keeps_its_dtype_and_is_frozen(self, tiny_llama_untied: Path) -> None:
        base, spec = loaded(tiny_llama_untied, SIXTEEN, torch.bfloat16)
        before = {name: value.dtype for name, value in base.model.named_parameters()}
        model = attach_adapter(base, spec, 0).model
        after = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): value.dtype
            for name, value in frozen(model).items()
        }
        assert after == before
        assert all(".lora_" in name for name in trainable(model))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_cast_is_noticed(self, tiny_llama: Path, dtype: torch.dtype) -> None:
        """As TRL's trainers do it to every trainable parameter of a quantized model."""
        model = attached(tiny_llama).model
        layer = layers_of(model)["1.mlp.up_proj"]
        layer.lora_B["default"].to(dtype)
        with pytest.raises(AssertionError, match=r"not float32: .*1\.mlp\.up_proj\.lora_B"):
            require_float32_trainables(model)

    def test_a_frozen_cast_is_no_fault(self, tiny_llama: Path) -> None:
        model = attached(tiny_llama).model
        model.get_input_embeddings().to(torch.bfloat16)
        require_float32_trainables(model)


class TestScaling:
    @pytest.mark.parametrize(
        ("use_rslora", "scaling"), [(False, 24 / 8), (True, 24 / math.sqrt(8))]
    )
    def test_of_every_module(self, tiny_llama: Path, use_rslora: bool, scaling: float) -> None:
        model = attached(tiny_llama, r=8, alpha=24, use_rslora=use_rslora).model
        found = {module.scaling["default"] for module in layers_of(model).values()}
        assert list(found) == [pytest.approx(scaling)]

    def test_is_what_the_update_is_multiplied_by(self, tiny_llama: Path) -> None:
        model = attached(tiny_llama, r=8, alpha=24, use_rslora=True).model
        shake(model)
        layer = layers_of(model)["1.mlp.up_proj"]
        rows = torch.randn(5, HIDDEN)
        a, b = (pair["default"].weight.detach() for pair in (layer.lora_A, layer.lora_B))
        weight = dequantized_weight(layer.get_base_layer()) + 24 / math.sqrt(8) * b @ a
        model.eval()
        torch.testing.assert_close(layer(rows).detach(), rows @ weight.T, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_patterns_reach_their_modules_and_no_others(
        self, tiny_llama: Path, use_rslora: bool
    ) -> None:
        model = attached(
            tiny_llama,
            r=4,
            alpha=8,
            use_rslora=use_rslora,
            rank_pattern={"q_proj": 2, r"0\.mlp\.(up|down)_proj": 16, "layers.1.mlp.up_proj": 3},
            alpha_pattern={r"layers\.1\.self_attn\..*": 5},
        ).model
        special = {
            "0.self_attn.q_proj": (2, 8),
            "1.self_attn.q_proj": (2, 5),
            "0.mlp.up_proj": (16, 8),
            "0.mlp.down_proj": (16, 8),
            "1.mlp.up_proj": (3, 8),
            **{f"1.self_attn.{kind}_proj": (4, 5) for kind in "kvo"},
        }
        layers = layers_of(model)
        assert len(layers) == 14
        for name, layer in layers.items():
            rank, alpha = special.get(name, (4, 8))
            outputs, inputs = SHAPES[name.rpartition(".")[2]]
            assert layer.lora_A["default"].weight.shape == (rank, inputs), name
            assert layer.lora_B["default"].weight.shape == (outputs, rank), name
            divisor = math.sqrt(rank) if use_rslora else rank
            assert layer.scaling["default"] == pytest.approx(alpha / divisor), name

    def test_dropout_reaches_every_module(self, tiny_llama: Path) -> None:
        model = attached(tiny_llama, dropout=0.25).model
        found = [layer.lora_dropout["default"] for layer in layers_of(model).values()]
        assert {getattr(one, "p", None) for one in found} == {0.25}


class TestDora:
    @pytest.mark.parametrize("quantization", [FOUR, SIXTEEN], ids=["4", "16"])
    def test_trains_magnitudes_and_comes_back(
        self, tiny_llama: Path, tmp_path: Path, quantization: QuantizationSpec
    ) -> None:
        base, spec = loaded(tiny_llama, quantization, use_dora=True)
        start = logits(base.model)
        model = attach_adapter(base, spec, 0).model
        torch.testing.assert_close(logits(model), start, rtol=0, atol=1e-4)
        before = trainable(model)
        losses = [train_a_step(model, rate=0.05) for _ in range(4)]
        assert losses[-1] < losses[0] - 0.01
        moved = [n for n, value in trainable(model).items() if not torch.equal(value, before[n])]
        magnitudes = {name for name in before if "magnitude" in name}
        assert len(magnitudes) == 14
        assert magnitudes <= set(moved)
        tuned = logits(model)
        back = there_and_back(model, base, quantization, tmp_path / "adapter")
        torch.testing.assert_close(logits(back), tuned, rtol=0, atol=1e-5)

    def test_is_a_direction_times_a_magnitude(self, tiny_llama: Path) -> None:
        """arXiv:2402.09353, equation 5: m · (W + BA) / ‖W + BA‖, norms of rows in torch's order."""
        model = attached(tiny_llama, use_dora=True, alpha=12).model
        shake(model)
        layer = layers_of(model)["0.mlp.down_proj"]
        a, b = (pair["default"].weight.detach().numpy() for pair in (layer.lora_A, layer.lora_B))
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().numpy()
        direction = dequantized_weight(layer.get_base_layer()).numpy() + 12 / 4 * b @ a
        weight = magnitude[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
        rows = np.random.default_rng(0).standard_normal((5, INNER), np.float32)
        model.eval()
        found = layer(torch.from_numpy(rows)).detach().numpy()
        np.testing.assert_allclose(found, rows @ weight.T, rtol=1e-3, atol=1e-4)

    def test_on_8_bits_on_a_cpu_is_refused(
        self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from qlora_kit.model import base as base_module

        monkeypatch.setattr(base_module, "load_model", lambda *_: pytest.fail("it was loaded"))
        with pytest.raises(AdapterError, match="DoRA on an 8-bit base on a CPU"):
            loaded(tiny_llama, EIGHT, use_dora=True)

    def test_trained_elsewhere_on_8_bits_is_refused_on_a_cpu_too(
        self, tiny_llama: Path, tmp_path: Path
    ) -> None:
        base = load(tiny_llama, EIGHT)
        model = attach_adapter(base, LoraSpec(r=4, use_dora=True), 0).model
        with pytest.raises(AdapterError, match="DoRA on an 8-bit base on a CPU"):
            there_and_back(model, base, EIGHT, tmp_path / "adapter")

    def test_upstream_still_loses_the_scales(self, tiny_llama: Path) -> None:
        """Why it is refused; when this fails, upstream has mended it."""
        model = attach_adapter(load(tiny_llama, EIGHT), LoraSpec(r=4, use_dora=True), 0).model
        logits(model)
        with pytest.raises(AttributeError, match="NoneType"):
            logits(model)


class TestModulesTrainedInFull:
    def test_the_head_moves_and_the_one_below_it_stays(self, tiny_llama_untied: Path) -> None:
        base, spec = loaded(tiny_llama_untied, modules_to_save=("lm_head",))
        start = base.model.lm_head.weight.detach().clone()
        model = attach_adapter(base, spec, 0).model
        head = model.base_model.model.lm_head
        assert torch.equal(head.modules_to_save["default"].weight, start)
        losses = [train_a_step(model) for _ in range(3)]
        assert losses[-1] < losses[0] - 0.01
        assert not torch.equal(head.modules_to_save["default"].weight, start)
        assert torch.equal(head.original_module.weight, start)

    def test_a_tied_head_leaves_the_embedding_alone(self, tiny_llama: Path) -> None:
        base, spec = loaded(tiny_llama, modules_to_save=("lm_head",))
        start = base.model.get_input_embeddings().weight.detach().clone()
        model = attach_adapter(base, spec, 0).model
        train_a_step(model)
        assert torch.equal(model.get_input_embeddings().weight, start)
        copy = model.base_model.model.lm_head.modules_to_save["default"].weight
        assert not torch.equal(copy, start)

    @pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "norm"])
    def test_come_back_as_they_were_trained(
        self, tiny_llama_untied: Path, tmp_path: Path, module: str
    ) -> None:
        """In float32 on a base in 16 bits, which PEFT alone would round them to."""
        base, spec = loaded(tiny_llama_untied, dtype=torch.bfloat16, modules_to_save=(module,))
        model = attach_adapter(base, spec, 0).model
        shake(model)
        (trained,) = [value for name, value in trainable(model).items() if ".lora_" not in name]
        with torch.autocast("cpu", torch.bfloat16):
            tuned = logits(model)
        back = there_and_back(model, base, FOUR, tmp_path / "adapter")
        (found,) = [v for name, v in back.named_parameters() if "modules_to_save" in name]
        torch.testing.assert_close(found, trained, rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(logits(back), tuned, rtol=0, atol=0)
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert {value.dtype for value in stored.values()} == {torch.float32}


class TestNewTokens:
    TOKENS = ("<left>", "<right>")

    @pytest.fixture(params=["tied", "untied", "tied, grown", "untied, grown"])
    def folder(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        """Grown: a vocabulary without spare rows."""
        size = 320 if "grown" in request.param else VOCABULARY
        return build_llama(tmp_path / "base", tied="untied" not in request.param, vocab_size=size)

    @staticmethod
    def matrices(model: PeftModel) -> list[torch.Tensor]:
        """Embedding and head, as the next step would use them."""
        inner = model.base_model.model
        wrapped = (inner.model.embed_tokens, inner.lm_head)
        return [one.token_adapter.get_merged_weights(["default"]).detach() for one in wrapped]

    def test_only_their_rows_change_and_they_come_back_offline(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """PEFT alone asks the hub whether the vocabulary has grown, and offline leaves rows out."""
        monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
        base, spec = loaded(folder, new_tokens=self.TOKENS)
        num_known = len(base.tokenizer)
        model = attach_adapter(base, spec, 0).model
        new = base.tokenizer.convert_tokens_to_ids(list(self.TOKENS))
        assert new == [num_known, num_known + 1]
        assert base.tokenizer("go <left>")["input_ids"][-1] == new[0]

        ids = some_ids()
        ids[:, 3], ids[:, 7] = new[0], new[1]
        before = self.matrices(model)
        losses = [train_a_step(model, 0.05, ids) for _ in range(3)]
        assert losses[-1] < losses[0]
        after = self.matrices(model)
        for was, now in zip(before, after, strict=True):
            changed = (was != now).any(dim=1).nonzero().flatten().tolist()
            assert changed == new
        is_tied = base.model.config.tie_word_embeddings
        assert torch.equal(*after) == is_tied

        tuned = logits(model, ids)
        back = there_and_back(model, base, FOUR, tmp_path / "adapter")
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        num_stored = sum(value.numel() for value in stored.values())
        assert num_stored == sum(value.numel() for value in trainable(model).values())
        for was, now in zip(after, self.matrices(back), strict=True):
            torch.testing.assert_close(now[: num_known + 2], was[: num_known + 2], rtol=0, atol=0)
        torch.testing.assert_close(
            logits(back, ids)[..., : num_known + 2], tuned[..., : num_known + 2], rtol=0, atol=0
        )

    def test_start_from_nothing_else_than_before(self, folder: Path) -> None:
        base, spec = loaded(folder, new_tokens=self.TOKENS)
        start = logits(base.model)
        found = logits(attach_adapter(base, spec, 0).model)
        torch.testing.assert_close(found[..., : start.shape[-1]], start, rtol=0, atol=0)

    def test_that_are_known(self, tiny_llama: Path) -> None:
        with pytest.raises(AdapterError, match=r"new_tokens: the vocabulary has <\|im_end\|> alr"):
            attached(tiny_llama, new_tokens=("<new>", "<|im_end|>"))

    def test_beside_a_head_trained_in_full(self, tiny_llama_untied: Path, tmp_path: Path) -> None:
        base, spec = loaded(tiny_llama_untied, new_tokens=("<a>",), modules_to_save=("lm_head",))
        adapted = attach_adapter(base, spec, 0)
        assert adapted.num_trainable == RANK_4 + EMBEDDING + HIDDEN
        train_a_step(adapted.model)
        tuned = logits(adapted.model)
        back = there_and_back(adapted.model, base, FOUR, tmp_path / "adapter")
        torch.testing.assert_close(logits(back), tuned, rtol=0, atol=0)


class TestTheStart:
    def test_every_value_is_tried_here(self) -> None:
        values = get_args(LoraSpec.model_fields["init"].annotation)
        assert set(values) == {"default", "gaussian", "loftq", "pissa"}

    def test_default_and_gaussian_start_at_the_base(self, tiny_llama: Path) -> None:
        base, _ = loaded(tiny_llama)
        start = logits(base.model)
        for init in ("default", "gaussian"):
            model = attached(tiny_llama, init=init).model
            torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
            tensors = trainable(model)
            assert not any(value.any() for name, value in tensors.items() if ".lora_B." in name)
            assert all(value.any() for name, value in tensors.items() if ".lora_A." in name)

    def test_gaussian_is_one(self, tiny_llama: Path) -> None:
        """Of standard deviation 1 / r, where the default is uniform within 1 / √inputs."""
        r = 16
        of_a = {
            init: torch.cat(
                [
                    value.flatten() * math.sqrt(value.shape[1])
                    for name, value in trainable(attached(tiny_llama, r=r, init=init).model).items()
                    if ".lora_A." in name
                ]
            )
            for init in ("default", "gaussian")
        }
        assert of_a["default"].abs().max() <= 1
        assert of_a["default"].std() == pytest.approx(1 / math.sqrt(3), rel=0.03)
        assert of_a["gaussian"].abs().max() > 1.5

    def test_loftq_starts_elsewhere(self, tiny_llama: Path) -> None:
        base, _ = loaded(tiny_llama)
        model = attached(tiny_llama, init="loftq").model
        assert not torch.allclose(logits(model), logits(base.model), atol=1e-3)
        default = trainable(attached(tiny_llama).model)
        found = trainable(model)
        assert found.keys() == default.keys()
        assert all(not torch.equal(value, default[name]) for name, value in found.items())

    def test_pissa_is_refused_by_the_recipe(self) -> None:
        (fault,) = LoraSpec(init="pissa").contradictions()
        assert fault.path == "init"
        assert "quantized one cannot be rewritten" in fault.message


class TestTheSeed:
    @pytest.mark.parametrize("lora", [{}, {"init": "gaussian"}, {"new_tokens": ("<a>",)}], ids=str)
    def test_decides_the_start(self, tmp_path: Path, lora: dict[str, Any]) -> None:
        """Whatever was drawn before; new rows are drawn too, where there are none to spare."""
        folder = build_llama(tmp_path / "base", vocab_size=320)
        first = trainable(attached(folder, seed=7, **lora).model)
        torch.rand(17)
        again = trainable(attached(folder, seed=7, **lora).model)
        other = trainable(attached(folder, seed=8, **lora).model)
        assert first.keys() == again.keys() == other.keys()
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        drawn = [name for name in first if ".lora_A." in name or "token" in name]
        assert drawn
        assert all(not torch.equal(first[name], other[name]) for name in drawn)


class TestItsConfig:
    def test_names_a_base_from_the_hub_as_others_find_it(self, tiny_llama: Path) -> None:
        base, spec = loaded(tiny_llama)
        source = replace(base.source, kind="hub", name="owner/model", revision="abc123")
        model = attach_adapter(replace(base, source=source), spec, 0).model
        assert model.peft_config["default"].base_model_name_or_path == "owner/model"
        assert model.peft_config["default"].revision == "abc123"

    def test_says_what_was_asked(self, tiny_llama: Path) -> None:
        model = attached(tiny_llama, r=6, alpha=9, dropout=0.5, use_rslora=True).model
        config = model.peft_config["default"]
        assert (config.r, config.lora_alpha, config.lora_dropout) == (6, 9, 0.5)
        assert config.use_rslora
        assert not config.use_dora
        assert config.task_type == "CAUSAL_LM"
        assert config.bias == "none"
        assert set(config.target_modules) == set(SHAPES)
