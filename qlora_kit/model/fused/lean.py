"""Parts of a model that keep less for the backward pass than their own code does.

They are known by what they compute: a module that looks like a gated MLP or an RMSNorm is given
real hidden states, and has to come to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qlora_kit.model.fused.gated import GatedForward, is_gated, looks_gated
from qlora_kit.model.fused.norm import NormForward, NormKind, kind_of, looks_like_norm
from qlora_kit.model.fused.remade import Origins
from qlora_kit.model.fused.replaced import replaced_forward


@dataclass(frozen=True)
class LeanParts:
    """By the names of modules."""

    mlps: tuple[str, ...] = ()
    norms: Mapping[str, NormKind] = field(default_factory=dict)

    def joined(self, other: LeanParts) -> LeanParts:
        return LeanParts(self.mlps + other.mlps, {**self.norms, **other.norms})


NO_PARTS = LeanParts()


@dataclass
class Seen:
    """What was found while tokens passed through a model."""

    mlps: dict[str, bool] = field(default_factory=dict)
    norms: dict[str, NormKind | None] = field(default_factory=dict)

    @property
    def parts(self) -> LeanParts:
        """Those of which each call came to the same."""
        mlps = tuple(name for name, is_same in self.mlps.items() if is_same)
        return LeanParts(mlps, {name: kind for name, kind in self.norms.items() if kind})


@contextmanager
def looking_for_lean_parts(model: nn.Module) -> Iterator[Seen]:
    """Pass tokens through the model within the context; afterwards its parts are known."""
    seen = Seen()

    def at_mlp(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
            so_far = len(arguments) == 1 and seen.mlps.get(name, True)
            seen.mlps[name] = so_far and is_gated(module, arguments[0])

        return hook

    def at_norm(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
            is_plain = len(arguments) == 1 and isinstance(output, torch.Tensor)
            kind = kind_of(module, arguments[0].detach(), output.detach()) if is_plain else None
            seen.norms[name] = kind if seen.norms.get(name, kind) == kind else None

        return hook

    handles = []
    for name, module in model.named_modules():
        if looks_gated(module):
            handles.append(module.register_forward_hook(at_mlp(name)))
        elif looks_like_norm(module):
            handles.append(module.register_forward_hook(at_norm(name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def lean(model: nn.Module, parts: LeanParts, origins: Origins) -> Iterator[None]:
    """These parts keep less, while the context lasts.

    Args:
        origins: is told how their results can be made again.
    """
    with ExitStack() as stack:
        for name in parts.mlps:
            module = model.get_submodule(name)
            stack.enter_context(replaced_forward(module, GatedForward(module, origins)))
        for name, kind in parts.norms.items():
            module = model.get_submodule(name)
            stack.enter_context(replaced_forward(module, NormForward(module, kind, origins)))
        yield
