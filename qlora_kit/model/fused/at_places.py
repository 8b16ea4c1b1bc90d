"""The last MLP of a model at the places whose hidden states the loss asks for, and nowhere else.

Behind it stand a norm and the head alone, which see each place by itself: what it would make of the
others nobody reads. There its result is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_kit.memory.kept import LENGTHS, recomputing_layers
from qlora_kit.model.fused.attach import is_lora_layer, why_left
from qlora_kit.model.fused.linear import is_frozen_linear

FEWEST_TOKENS = 2 * max(LENGTHS)
"""Of a batch for which it is worth while. The sequences on which it is counted what layers keep are
shorter: of them all is kept, as of a batch that is all supervised."""
# Of a batch; of more, what is gathered and put back costs about as much as is saved.
_LARGEST_SHARE = 0.9


@dataclass(frozen=True)
class Wanted:
    """The places of one batch that its loss asks for."""

    indices: torch.Tensor
    """(N,), one row of the batch after the other."""
    count: int
    """Of all places of the batch."""


class Places:
    """Those of the batch that goes through a model, forward or, in layers that compute again,
    backward: that may be another one than went through last.
    """

    def __init__(self) -> None:
        self._forward: Wanted | None = None
        self._backward: Wanted | None = None

    @contextmanager
    def going_through(self, wanted: Wanted) -> Iterator[None]:
        """While its forward pass lasts."""
        self._forward = wanted
        try:
            yield
        finally:
            self._forward = None

    def follow(self, hidden: torch.Tensor, wanted: Wanted) -> None:
        """From the moment when the backward pass comes to these hidden states, it is this batch."""

        def begin(_: torch.Tensor) -> None:
            self._backward = wanted

        if hidden.requires_grad:
            hidden.register_hook(begin)

    @property
    def wanted(self) -> Wanted | None:
        """None: nobody knows, so that all are."""
        is_backward = torch._C._current_graph_task_id() != -1
        return self._backward if is_backward else self._forward


class AtPlaces:
    """The forward pass of a module that sees each place by itself."""

    def __init__(self, own: Callable[..., torch.Tensor], places: Places, least: int):
        """Args: least: tokens of a batch of which some may be left out."""
        self.own = own
        self.places = places
        self.least = least

    def __call__(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """(B, S, H) → (B, S, H)"""
        wanted, count = self.places.wanted, x.shape[:-1].numel()
        if arguments or options or wanted is None or wanted.count != count or count < self.least:
            return self.own(x, *arguments, **options)
        if not 0 < len(wanted.indices) <= _LARGEST_SHARE * count:
            return self.own(x)
        chosen = x.reshape(count, -1).index_select(0, wanted.indices)
        y = self.own(chosen[None]).squeeze(0)
        whole = y.new_zeros((count, y.shape[-1])).index_copy(0, wanted.indices, y)
        return whole.view(*x.shape[:-1], -1)


def last_of(model: nn.Module, mlps: Collection[str]) -> str | None:
    """Of these MLPs the one of the last layer; None where it does not see each place by itself and
    draw nothing.
    """
    layers = recomputing_layers(model)
    if not layers:
        return None
    within = set(map(id, layers[-1].modules()))
    found = [name for name in mlps if id(model.get_submodule(name)) in within]
    if len(found) != 1 or not _is_by_place(model.get_submodule(found[0])):
        return None
    return found[0]


def _is_by_place(mlp: nn.Module) -> bool:
    """Products in 8 bits look at all places together; dropout would draw other numbers."""
    for module in mlp.children():
        if is_lora_layer(module):
            layer: Any = module
            drops = any(getattr(one, "p", 0.0) > 0 for one in layer.lora_dropout.values())
            if drops or why_left(layer) is not None:
                return False
        elif (isinstance(module, nn.Dropout) and module.p > 0) or (
            list(module.parameters()) and not is_frozen_linear(module)
        ):
            return False
    return True
