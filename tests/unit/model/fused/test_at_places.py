"""The last MLP at supervised places alone, against all places: outcomes, and what it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from qlora_kit.model.fused.at_places import FEWEST_TOKENS, AtPlaces, Places, Wanted, last_of
from qlora_kit.model.fused.lean import lean
from qlora_kit.model.fused.remade import Origins
from qlora_kit.model.fused.replaced import replaced_forward
from qlora_kit.train.supervised_loss import SupervisedForward, supervised_only

from .test_lean import GATED, adapted, all_fused, found_in, require_same

_TWO_LAYERS = ("gpt-neox: fused QKV", "phi", "phi3: fused QKV and gate", "starcoder2")
_GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(3, 300, (3, 50), generator=_GENERATOR)
LABELS = IDS.masked_fill(torch.rand(IDS.shape, generator=_GENERATOR) < 0.6, -100)
NUM_SUPERVISED = int((LABELS[:, 1:] != -100).sum())


@contextmanager
def narrowed(model: Any, name: str) -> Iterator[list[int]]:
    """How many places the MLP sees, each time."""
    mlp = model.get_submodule(name)
    seen: list[int] = []
    forward = model.get_base_model().forward
    assert isinstance(forward, SupervisedForward)

    def own(x: torch.Tensor, inner: Any = mlp.forward) -> torch.Tensor:
        seen.append(x.shape[:-1].numel())
        y: torch.Tensor = inner(x)
        return y

    with replaced_forward(mlp, AtPlaces(own, forward.places, FEWEST_TOKENS)):
        yield seen


def outcome(model: Any, labels: torch.Tensor = LABELS) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=labels, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("name", [*GATED, *_TWO_LAYERS])
def test_loss_and_gradients_are_the_same(name: str, is_fused: bool) -> None:
    model = adapted(name)
    parts = found_in(model)
    last = last_of(model, parts.mlps)
    assert last is not None
    with ExitStack() as stack:
        stack.enter_context(supervised_only(model.get_base_model()))
        wanted = outcome(model)
        if is_fused:
            stack.enter_context(all_fused(model, parts))
        seen = stack.enter_context(narrowed(model, last))
        # Of attention with biases the gradients are a thousandth of others, and rounding is not.
        require_same(outcome(model), wanted, 3e-5 if name in _TWO_LAYERS else 1e-5)
    assert seen == [NUM_SUPERVISED]
    assert IDS.numel() / 2 > NUM_SUPERVISED


def test_a_layer_that_recomputes_gives_the_same_bits() -> None:
    model = adapted("llama, untied")
    last = last_of(model, found_in(model).mlps)
    assert last is not None
    with supervised_only(model.get_base_model()), narrowed(model, last) as seen:
        wanted = outcome(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found = outcome(model)
    assert found[0] == wanted[0]
    assert all(torch.equal(found[1][key], one) for key, one in wanted[1].items())
    assert seen == [NUM_SUPERVISED] * 3


def test_all_places_are_computed_where_little_can_be_left_out() -> None:
    """All of them supervised, none, a short batch, and a forward pass without labels."""
    model = adapted("llama, untied")
    last = last_of(model, found_in(model).mlps)
    assert last is not None
    with supervised_only(model.get_base_model()), narrowed(model, last) as seen:
        outcome(model, IDS)
        loss, gradients = outcome(model, torch.full_like(IDS, -100))
        model(input_ids=IDS[:1, :20], labels=LABELS[:1, :20], use_cache=False)
        outcome(model)
        model(input_ids=IDS, use_cache=False)
    assert seen == [IDS.numel(), IDS.numel(), 20, NUM_SUPERVISED, IDS.numel()]
    assert loss != loss or loss == 0
    assert not any(one.any() for one in gradients.values() if not one.isnan().any())


def test_what_it_gives_elsewhere_is_zero() -> None:
    x = torch.randn(2, 100, 8)
    indices, places = torch.tensor([3, 150]), Places()
    doubled = AtPlaces(lambda given: given * 2, places, 1)
    with places.going_through(Wanted(indices, 200)):
        made = doubled(x)
        of_another_batch = doubled(x[:, :90])
    assert torch.equal(made.flatten(0, 1)[indices], 2 * x.flatten(0, 1)[indices])
    assert int(made.flatten(0, 1).any(-1).sum()) == 2
    assert torch.equal(of_another_batch, 2 * x[:, :90])
    assert torch.equal(doubled(x), 2 * x), "the batch has gone through"


@pytest.mark.parametrize("num_others", [NUM_SUPERVISED, 7])
def test_layers_compute_again_for_the_batch_that_the_backward_pass_is_at(num_others: int) -> None:
    """Of two batches whose backward pass is one, and with one in between that has none."""
    model = adapted("llama, untied")
    last = last_of(model, found_in(model).mlps)
    assert last is not None
    others = IDS.flip(1).clone()
    others.flatten()[num_others + 1 :] = -100
    batches = [(IDS, LABELS), (IDS.flip(1), others)]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        losses = [model(input_ids=i, labels=j, use_cache=False).loss for i, j in batches]
        with torch.no_grad():
            model(input_ids=IDS, labels=LABELS.roll(3, 0), use_cache=False)
        sum(losses).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with supervised_only(model.get_base_model()), narrowed(model, last):
        wanted = gradients()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found = gradients()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_dropout_and_products_that_see_all_places_leave_it_alone() -> None:
    model = adapted("llama, untied")
    mlps = found_in(model).mlps
    assert last_of(model, mlps) == mlps[-1]
    assert last_of(model, mlps[:1]) is None
    assert last_of(torch.nn.Sequential(), ()) is None
    dropping = adapted("llama, untied", dropout=0.1)
    assert last_of(dropping, found_in(dropping).mlps) is None
    of_two_layers = adapted("gpt-j: head with a bias")
    mlp = of_two_layers.get_submodule(found_in(of_two_layers).mlps[-1])
    for p, last in ((0.0, found_in(of_two_layers).mlps[-1]), (0.1, None)):
        mlp.dropout.p = p
        assert last_of(of_two_layers, found_in(of_two_layers).mlps) == last
    down = model.get_submodule(mlps[-1]).down_proj
    type_of_base = type(down.base_layer)
    down.base_layer.__class__ = type("Linear8bitLt", (type_of_base,), {})
    assert last_of(model, mlps) is None


def test_it_keeps_less_of_what_is_computed_there() -> None:
    model = adapted("llama, untied")
    parts = found_in(model)
    sizes = []
    with supervised_only(model.get_base_model()), lean(model, parts, Origins()):
        for name in (None, parts.mlps[-1]):
            with ExitStack() as stack:
                if name is not None:
                    stack.enter_context(narrowed(model, name))
                kept: dict[int, int] = {}

                def note(one: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
                    kept[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
                    return one

                with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
                    model(input_ids=IDS, labels=LABELS, use_cache=False)
                sizes.append(sum(kept.values()))
    width = 128
    assert sizes[0] - sizes[1] > 2 * width * (IDS.numel() - NUM_SUPERVISED) * 4
