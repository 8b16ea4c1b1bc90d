"""Parts of a model that keep less for the backward pass than their own code does, or take less.

They are known by what they compute: a module that looks like an MLP or an RMSNorm is given
real hidden states, and has to come to the same bits; a family's rotary embedding, queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from qlora_kit.model.fused import gated, layer_norm, liger, norm, rotary
from qlora_kit.model.fused.gated import GatedForward, is_gated, looks_gated
from qlora_kit.model.fused.layer_norm import LayerNormForward
from qlora_kit.model.fused.norm import NormForward, NormKind, kind_of, looks_like_norm
from qlora_kit.model.fused.remade import Origins
from qlora_kit.model.fused.replaced import replaced_forward
from qlora_kit.model.fused.rotary import (
    RotaryForward,
    Rotate,
    is_rotation,
    replaced_rotary,
    rotary_files,
)
from qlora_kit.model.fused.two_layer_mlp import TwoLayerForward, is_two_layers, two_layers_of


@dataclass(frozen=True)
class LeanParts:
    """By the names of modules, of the model and of Python."""

    mlps: tuple[str, ...] = ()
    norms: Mapping[str, NormKind] = field(default_factory=dict)
    """RMSNorms."""
    rotary: tuple[str, ...] = ()
    """Of Python."""
    layer_norms: tuple[str, ...] = ()

    @property
    def num_norms(self) -> int:
        return len(self.norms) + len(self.layer_norms)

    @property
    def all_norms(self) -> LeanParts:
        """Its norms, of either kind."""
        return LeanParts(norms=self.norms, layer_norms=self.layer_norms)

    def joined(self, other: LeanParts) -> LeanParts:
        return LeanParts(
            self.mlps + other.mlps,
            {**self.norms, **other.norms},
            self.rotary + other.rotary,
            self.layer_norms + other.layer_norms,
        )


NO_PARTS = LeanParts()


@dataclass
class Seen:
    """What was found while tokens passed through a model."""

    mlps: dict[str, bool] = field(default_factory=dict)
    norms: dict[str, NormKind | None] = field(default_factory=dict)
    rotary: dict[str, bool] = field(default_factory=dict)
    layer_norms: dict[str, bool] = field(default_factory=dict)

    @property
    def parts(self) -> LeanParts:
        """Those of which each call came to the same."""
        norms = {name: kind for name, kind in self.norms.items() if kind}
        return LeanParts(_same(self.mlps), norms, _same(self.rotary), _same(self.layer_norms))


def _same(found: Mapping[str, bool]) -> tuple[str, ...]:
    return tuple(name for name, is_same in found.items() if is_same)


@contextmanager
def looking_for_lean_parts(model: nn.Module) -> Iterator[Seen]:
    """Pass tokens through the model within the context; afterwards its parts are known."""
    seen = Seen()

    def at_mlp(name: str) -> Callable[..., None]:
        def hook(
            module: Any, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Any
        ) -> None:
            so_far = len(arguments) == 1 and not named and seen.mlps.get(name, True)
            seen.mlps[name] = so_far and is_mlp(module, arguments[0])

        return hook

    def at_norm(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
            is_plain = len(arguments) == 1 and isinstance(output, torch.Tensor)
            kind = kind_of(module, arguments[0].detach(), output.detach()) if is_plain else None
            seen.norms[name] = kind if seen.norms.get(name, kind) == kind else None

        return hook

    def at_layer_norm(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
            so_far = len(arguments) == 1 and seen.layer_norms.get(name, True)
            seen.layer_norms[name] = so_far and layer_norm.is_same(
                module, arguments[0].detach(), output.detach()
            )

        return hook

    def at_rotary(name: str, own: Rotate) -> Rotate:
        def watched(*given: Any, **named: Any) -> Any:
            so_far = len(given) == 4 and not named and seen.rotary.get(name, True)
            seen.rotary[name] = so_far and is_rotation(own, *given)
            return own(*given, **named)

        return watched

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if looks_like_mlp(module):
                handle = module.register_forward_hook(at_mlp(name), with_kwargs=True)
            elif layer_norm.is_layer_norm(module):
                handle = module.register_forward_hook(at_layer_norm(name))
            elif looks_like_norm(module):
                handle = module.register_forward_hook(at_norm(name))
            else:
                continue
            stack.callback(handle.remove)
        for name, file in rotary_files(model).items():
            stack.enter_context(replaced_rotary(file, partial(at_rotary, name)))
        yield seen


def looks_like_mlp(module: nn.Module) -> bool:
    """Of two layers, or of three."""
    return looks_gated(module) or two_layers_of(module) is not None


def is_mlp(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether one that looks so gives the same numbers when it is computed here."""
    layers = two_layers_of(module)
    return is_gated(module, x) if layers is None else is_two_layers(module, layers, x)


@contextmanager
def lean(
    model: nn.Module, parts: LeanParts, origins: Origins, by_liger: Collection[str] = ()
) -> Iterator[None]:
    """These parts keep less, while the context lasts.

    Args:
        origins: is told how their results can be made again.
        by_liger: of `liger.OPERATIONS`, those that Liger's kernels compute.
    """
    norm_ops = liger.LigerNorm() if liger.NORM in by_liger else norm.BY_TORCH
    gated_ops = liger.LigerGated() if liger.GATED in by_liger else gated.BY_TORCH
    rotary_ops = liger.LigerRotary() if liger.ROTARY in by_liger else rotary.BY_TORCH
    files = rotary_files(model) if parts.rotary else {}
    with ExitStack() as stack:
        for name in parts.mlps:
            module = model.get_submodule(name)
            layers = two_layers_of(module)
            forward: Callable[..., Any] = (
                GatedForward(module, origins, gated_ops)
                if layers is None
                else TwoLayerForward(module, layers, origins)
            )
            stack.enter_context(replaced_forward(module, forward))
        for name, kind in parts.norms.items():
            module = model.get_submodule(name)
            normed = NormForward(module, kind, origins, norm_ops)
            stack.enter_context(replaced_forward(module, normed))
        for name in parts.layer_norms:
            module = model.get_submodule(name)
            assert isinstance(module, nn.LayerNorm)
            stack.enter_context(replaced_forward(module, LayerNormForward(module, origins)))
        for name in parts.rotary:
            made = partial(RotaryForward, ops=rotary_ops)
            stack.enter_context(replaced_rotary(files[name], made))
        yield
