"""Which parts of a model may keep less or take less, where its tensors have no numbers: its modules
are tried with a few of their own, as training tries them on real hidden states.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from qlora_kit.model.fused.layer_norm import is_layer_norm
from qlora_kit.model.fused.lean import LeanParts, is_mlp, looks_like_mlp
from qlora_kit.model.fused.norm import NormKind, kind_of, looks_like_norm
from qlora_kit.model.fused.rotary import rotary_files, rotates_in_halves
from qlora_kit.model.fused.two_layer_mlp import two_layers_of

_WIDTH, _INNER = 8, 12


def lean_parts_by_stand_ins(model: nn.Module) -> LeanParts:
    """As `looking_for_lean_parts` finds them."""
    mlps: list[str] = []
    norms: dict[str, NormKind] = {}
    layer_norms: list[str] = []
    for name, module in model.named_modules():
        if looks_like_mlp(module) and _is_mlp(module):
            mlps.append(name)
        elif is_layer_norm(module):
            layer_norms.append(name)
        elif looks_like_norm(module):
            kind = _kind_of(module)
            if kind is not None:
                norms[name] = kind
    files = rotary_files(model).items()
    rotary = tuple(name for name, one in files if rotates_in_halves(one))
    return LeanParts(tuple(mlps), norms, rotary, tuple(layer_norms))


def _is_mlp(module: Any) -> bool:
    """By products of another size, as only what comes between them is the module's own."""
    generator = torch.Generator().manual_seed(0)
    layers = two_layers_of(module)
    if layers is None:
        wide = {name: _linear(_WIDTH, _INNER, generator) for name in ("gate_proj", "up_proj")}
        parts = {**wide, "down_proj": _linear(_INNER, _WIDTH, generator)}
    else:
        made = _INNER * (2 if layers.is_joined else 1)
        first, second = _linear(_WIDTH, made, generator), _linear(_INNER, _WIDTH, generator)
        parts = {layers.first: first, layers.second: second}
    one = _copied(module, {}, parts)
    try:
        return is_mlp(one, torch.randn((2, _WIDTH), generator=generator))
    except Exception:  # whatever its code says of sizes that are not its own
        return False


def _kind_of(module: Any) -> NormKind | None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(module.weight), generator=generator).to(module.weight.dtype)
    one = _copied(module, {"weight": nn.Parameter(weight, requires_grad=False)}, {})
    x = torch.randn((4, len(weight)), generator=generator).to(weight.dtype)
    try:
        with torch.no_grad():
            return kind_of(one, x, one.forward(x))
    except Exception:  # as above
        return None


def _copied(module: Any, parameters: dict[str, Any], children: dict[str, Any]) -> Any:
    """With other tensors and children, and the rest as it is."""
    one = copy.copy(module)
    one._parameters = {**one._parameters, **parameters}
    one._modules = {**one._modules, **children}
    return one


def _linear(width: int, height: int, generator: torch.Generator) -> nn.Linear:
    made = nn.Linear(width, height, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=generator))
    return made
