"""Norms, gated MLPs and rotary embeddings by Liger's Triton kernels, on a GPU.

Hsu et al. 2024, https://arxiv.org/abs/2410.10989. What they do not cover is computed by torch.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional as F

from qlora_kit.extras import fault_of
from qlora_kit.model.fused.gated import Activation, GatedOps
from qlora_kit.model.fused.norm import NormKind, NormOps
from qlora_kit.model.fused.rotary import RotaryOps

NORM, GATED, ROTARY = "norm", "gated", "rotary"
OPERATIONS = (NORM, GATED, ROTARY)
_ROUNDED, _WHOLE = "llama", "gemma"  # Liger's names for where a norm casts back
_PROBED = (-3.0, -0.5, 0.0, 0.7, 5.0)


def why_no_liger(device: torch.device) -> str | None:
    """What keeps its kernels from being used; None: nothing."""
    if device.type != "cuda":
        return "Triton kernels need a GPU"
    fault = fault_of("liger")
    return None if fault is None else f"needs {fault}; pip install 'qlora-kit[liger]'"


def _liger(name: str) -> ModuleType:
    """One of its files, of the default implementation."""
    return import_module(f"liger_kernel.ops.{name}")


class LigerNorm(NormOps):
    """One kernel in each direction, where torch takes seven and eight."""

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, kind: NormKind
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not _covers_norm(x, weight, kind):
            return super().forward(x, weight, eps, kind)
        y, _, reciprocal, *_ = _liger("rms_norm").rms_norm_forward(
            x.contiguous(), weight, eps, kind.offset, _casting(kind), None
        )
        return y, reciprocal.view(*x.shape[:-1], 1)

    def gradient(
        self,
        given: torch.Tensor,
        x: torch.Tensor,
        reciprocal: torch.Tensor,
        weight: torch.Tensor,
        kind: NormKind,
    ) -> torch.Tensor:
        if not _covers_norm(x, weight, kind):
            return super().gradient(given, x, reciprocal, weight, kind)
        module, width = _liger("rms_norm"), x.shape[-1]
        casting = module._str_to_casting_mode[_casting(kind)]
        block, num_warps = _liger("utils").calculate_settings(width)
        flat = (given.contiguous(), x.reshape(-1, width), weight, reciprocal.reshape(-1))
        how = (kind.offset, casting, block, num_warps)
        of_x: torch.Tensor = module.rms_norm_backward(
            *flat, *how, in_place=False, row_mode=None, needs_dw=False
        )[0]
        return of_x


def _covers_norm(x: torch.Tensor, weight: torch.Tensor, kind: NormKind) -> bool:
    """Liger's result has the input's dtype."""
    return not kind.scales_last or x.dtype == weight.dtype


def _casting(kind: NormKind) -> str:
    return _ROUNDED if kind.scales_last else _WHOLE


class LigerGated(GatedOps):
    """SwiGLU and GeGLU."""

    def product(self, gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
        name = kernel_of(act)
        if name is None:
            return super().product(gate, up, act)
        forward = getattr(_liger(name), f"{name}_forward")
        made: torch.Tensor = forward(gate.contiguous(), up.contiguous())[-1]
        return made

    def gradients(
        self, given: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: Activation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        name = kernel_of(act)
        if name is None:
            return super().gradients(given, gate, up, act)
        shape, width = gate.shape, gate.shape[-1]
        flat = [one.contiguous().view(-1, width) for one in (gate, up)]
        # They come to lie where gate and up were.
        found = getattr(_liger(name), f"{name}_backward")(*flat, given.contiguous())
        return found[0].view(shape), found[1].view(shape)


def kernel_of(act: Activation) -> str | None:
    """Which of Liger's has this activation; None: neither."""
    key = type(act) if isinstance(act, nn.Module) else act
    if key not in _known_activations:
        _known_activations[key] = _kernel_of(act)
    return _known_activations[key]


_known_activations: dict[object, str | None] = {}


def _kernel_of(act: Activation) -> str | None:
    probe = torch.tensor(_PROBED)
    with torch.no_grad():
        found = act(probe)
        if torch.allclose(found, F.silu(probe), atol=1e-6):
            return "swiglu"
        if torch.allclose(found, F.gelu(probe, approximate="tanh"), atol=1e-6):
            return "geglu"
    return None


class LigerRotary(RotaryOps):
    """In the memory of the queries and keys that are given."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rotated = _liger("rope").rope_forward(q, k, cos, sin)
        return rotated[0], rotated[1]

    def gradients(
        self, of_q: torch.Tensor, of_k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = _liger("rope").rope_backward(
            of_q, of_k, cos, sin
        )
        return found
