"""Packed examples do not see each other, or the run stops."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
)

from qlora_kit.data.collate import IsolatingCollator
from qlora_kit.data.pack import PackedSequence
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.model import by_example
from qlora_kit.model.by_example import attending_by_example
from qlora_kit.train.isolation import Leakage, leaking, measure_leakage

PAD = 0
COMMON = {"vocab_size": 96, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2}

ISOLATED: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON, **GROUPED, max_position_embeddings=128),
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON,
        **{**GROUPED, "num_hidden_layers": 3},
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=128,
    ),
}
LEAKING: dict[str, Callable[[], PreTrainedConfig]] = {
    "bloom": lambda: BloomConfig(**COMMON, hidden_size=32, n_layer=2, n_head=4),
    "opt": lambda: OPTConfig(
        **COMMON, **SHAPE, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128
    ),
    "mpt": lambda: MptConfig(**COMMON, d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
    "mamba": lambda: MambaConfig(**COMMON, hidden_size=32, state_size=8, num_hidden_layers=2),
}


def model_of(config: PreTrainedConfig, kernel: str = "eager") -> nn.Module:
    """Random, and not as near to a constant function as a fresh model is."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def sequences(*lengths: int) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for number, length in enumerate(lengths or (9, 14, 6, 20)):
        ids = tuple(torch.randint(3, 90, (length,), generator=generator).tolist())
        made.append(TokenSequence(ids, ids, f"rows.jsonl:{number + 1}"))
    return made


def logits(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs, use_cache=False).logits
    return found


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ISOLATED)
def test_packed_logits_are_those_alone(name: str, kernel: str) -> None:
    """Computed here from plain inputs, without a word of the probe's."""
    model = model_of(ISOLATED[name](), kernel)
    rows = sequences()
    items = [PackedSequence((rows[0], rows[1], rows[3])), PackedSequence((rows[2], rows[0]))]
    batch = IsolatingCollator(PAD)(items)
    packed = logits(model, input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    for number, item in enumerate(items):
        start = 0
        for part in item.parts:
            alone = logits(model, input_ids=torch.tensor([part.input_ids]))[0]
            found = packed[number, start : start + part.num_tokens]
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
            start += part.num_tokens


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ISOLATED)
def test_the_probe_lets_them_pass(name: str, kernel: str) -> None:
    leakage = measure_leakage(model_of(ISOLATED[name](), kernel), sequences(), PAD, torch.float32)
    assert leakage.is_isolated
    assert leakage.difference < 1e-5


@pytest.mark.parametrize("name", LEAKING)
def test_models_that_ignore_positions_are_refused(name: str) -> None:
    model = model_of(LEAKING[name]())
    leakage = measure_leakage(model, sequences(), PAD, torch.float32)
    assert not leakage.is_isolated
    assert leakage.difference > 0.01
    message = str(leaking("data.packing", leakage))
    assert message.startswith("data.packing: ")
    assert message.endswith("Set data.packing: false.")
    assert f"{leakage.difference:.1%}" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_rounding_is_told_from_leaking(name: str, dtype: torch.dtype) -> None:
    model = model_of({**ISOLATED, **LEAKING}[name]())
    leakage = measure_leakage(model, sequences(), PAD, dtype)
    assert leakage.is_isolated == (name in ISOLATED)


@pytest.mark.parametrize("lengths", [(1,), (2, 1), (300, 5), (1, 1, 1, 1, 1)])
def test_any_data_can_be_probed(lengths: tuple[int, ...]) -> None:
    """One row, rows of one token, and rows that are longer than the model's context here."""
    model = model_of(ISOLATED["llama"]())
    assert measure_leakage(model, sequences(*lengths), PAD, torch.float32).is_isolated


def test_the_mode_of_the_model_is_left_as_it_was() -> None:
    model = model_of(ISOLATED["llama"]())
    for training in (True, False):
        model.train(training)
        measure_leakage(model, sequences(), PAD, torch.float32)
        assert model.training is training


def test_dropout_does_not_look_like_leaking() -> None:
    config = ISOLATED["gpt2"]()
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    model = model_of(config).train()
    assert measure_leakage(model, sequences(), PAD, torch.float32).is_isolated


def test_a_model_that_takes_what_stands_for_a_mask_for_one_is_not_isolated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It sees nothing at all."""
    model = model_of(ISOLATED["gemma3"](), "sdpa")

    def probe() -> Leakage:
        attending = partial(attending_by_example, model)
        return measure_leakage(model, sequences(), PAD, torch.float32, attending)

    assert probe().is_isolated
    monkeypatch.setattr(by_example, "masks_behind", lambda mask: None)
    assert not probe().is_isolated


def test_logits_that_are_no_numbers_prove_nothing() -> None:
    model = model_of(ISOLATED["llama"]())
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    found = measure_leakage(model, sequences(), PAD, torch.float32)
    assert found == Leakage(math.inf, 1e-3)
    assert not found.is_isolated
