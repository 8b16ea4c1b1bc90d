"""The loss of supervised places alone: the same number and gradients as the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from qlora_kit.train import supervised_loss
from qlora_kit.train.supervised_loss import chunked_cross_entropy, supervised_only

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "logits capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16)),
    "logits scaled up": lambda: CohereForCausalLM(CohereConfig(**SMALL)),
    "logits scaled down": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=300,
            n_embd=64,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (3, 20), generator=random)
    left_out = torch.rand(ids.shape, generator=random) < 0.5
    return {"input_ids": ids, "labels": ids.masked_fill(left_out, -100)}


def outcome(model: Any, **more: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch(), **more).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


def require_same(one: Any, other: Any) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert torch.allclose(gradient, other[1][name], rtol=1e-4, atol=1e-7), name


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    built = MODELS[request.param]()
    built.config.loss_type = "ForCausalLM"
    return built.train()


@pytest.mark.parametrize("is_head_trained", [True, False])
@pytest.mark.parametrize("count", [None, 17])
def test_loss_and_gradients_are_those_of_the_model(
    model: Any, is_head_trained: bool, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks, by the number of places or by one that is given."""
    monkeypatch.setattr(supervised_loss, "_CHUNK_BYTES_ON_A_CPU", 1)
    monkeypatch.setattr(supervised_loss, "_FEWEST", 7)
    model.get_output_embeddings().weight.requires_grad_(is_head_trained)
    more = {} if count is None else {"num_items_in_batch": torch.tensor(count)}
    wanted = outcome(model, **more)
    with supervised_only(model):
        found = outcome(model, **more)
    require_same(found, wanted)
    require_same(outcome(model, **more), wanted)


@pytest.mark.parametrize(
    ("entries", "device", "places"),
    [(8192, "cpu", 1024), (49152, "cpu", 256), (151936, "cpu", 256), (151936, "cuda", 441)],
)
def test_a_chunk_is_of_so_many_places(entries: int, device: str, places: int) -> None:
    """32 MiB of logits (256 MiB on a GPU), but never fewer places than a product is fast with."""
    assert supervised_loss.chunk_size(entries, device) == places
    most = supervised_loss.chunk_bytes(entries, device)
    assert 4 * entries * places <= most < 4 * entries * (places + 1)


def test_the_head_sees_supervised_places_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-2]))
    labels = batch()["labels"]
    with supervised_only(model), torch.no_grad():
        model(**batch())
    assert sum(seen[1:]) == int((labels[:, 1:] != -100).sum()), "the first one only looks"


def test_without_labels_it_is_the_model(model: Any) -> None:
    model.eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        with supervised_only(model):
            found = model(input_ids=ids).logits
    assert torch.equal(found, wanted)


def test_a_batch_without_a_supervised_place_has_a_gradient_of_zero() -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]()
    ids = batch()["input_ids"]
    with supervised_only(model):
        loss = model(
            input_ids=ids, labels=torch.full_like(ids, -100), num_items_in_batch=torch.tensor(5)
        ).loss
        loss.backward()
    assert float(loss.detach()) == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    "is_kept", [False, True], ids=["plain", "logits that the head needs again"]
)
def test_chunks_add_up(size: int, is_kept: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 50, bias=False).requires_grad_(False)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits = linear(hidden)
        return torch.tanh(logits) if is_kept else logits

    hidden = torch.randn(10, 8, requires_grad=True)
    targets = torch.randint(0, 50, (10,))
    (2 * chunked_cross_entropy(hidden, targets, head, size)).backward()
    twin = hidden.detach().clone().requires_grad_()
    (2 * F.cross_entropy(head(twin), targets, reduction="sum")).backward()
    assert hidden.grad is not None
    assert twin.grad is not None
    assert torch.allclose(hidden.grad, twin.grad, atol=1e-6)
