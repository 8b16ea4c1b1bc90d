"""PEFT's LoRA layers with their forward pass as one operation, where it covers what they do, and
frozen layers by themselves with weights that stay.

Parameters, names and files stay PEFT's: only how the numbers come about is another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_kit.model.fused.linear import (
    FrozenLinear,
    frozen_output,
    is_frozen_linear,
    shared_input_lora,
)
from qlora_kit.model.fused.products import BY_TORCH, Products
from qlora_kit.model.fused.remade import Origins
from qlora_kit.model.fused.replaced import replaced_forward
from qlora_kit.model.fused.residents import Residents

if TYPE_CHECKING:
    from peft import PeftModel

_AWARE = "qlora_kit.model.qat.linear.QuantizedLora"
_KNOWN = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit")


@dataclass(frozen=True)
class Fusion:
    """Which layers of a model are computed as one operation, and which are left to PEFT."""

    groups: tuple[tuple[str, ...], ...]
    """Names of LoRA layers; those of a group are given the same input."""
    left: Counter[str] = field(default_factory=Counter)
    """Why how many others are not among them."""

    @property
    def num_layers(self) -> int:
        return sum(map(len, self.groups))


def plan_fusion(model: PeftModel, run: Callable[[], Any]) -> Fusion:
    """Find the layers that can be fused, and which of them share an input.

    Args:
        run: passes some tokens through the model.
    """
    lora_layers = [(name, one) for name, one in model.named_modules() if is_lora_layer(one)]
    reasons = {name: why_left(one) for name, one in lora_layers}
    calls: list[tuple[str, str, torch.Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            calls.append((name, name.rpartition(".")[0], arguments[0]))

        return hook

    able = [(name, one) for name, one in lora_layers if reasons[name] is None]
    handles = [one.register_forward_pre_hook(note(name)) for name, one in able]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    counts = Counter(name for name, _, _ in calls)
    once = [call for call in calls if counts[call[0]] == 1]
    shared = groupby(once, key=lambda call: (call[1], id(call[2])))
    groups = [tuple(name for name, _, _ in group) for _, group in shared]
    often = [(name,) for name, count in counts.items() if count > 1]
    return Fusion((*groups, *often), Counter(reason for reason in reasons.values() if reason))


def reasons_left(model: PeftModel) -> Counter[str]:
    """Why how many layers of a model have to be computed by PEFT."""
    reasons = (why_left(one) for one in model.modules() if is_lora_layer(one))
    return Counter(one for one in reasons if one)


def why_left(layer: Any) -> str | None:
    """Why a LoRA layer has to be computed by PEFT; None where it need not."""
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if kind == _AWARE:
        return "quantized while it is trained"
    if kind not in _KNOWN:
        return f"{type(layer).__name__} is of another kind"
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(adapters) != 1 or layer.merged:
        return "there is not one active adapter"
    if adapters[0] in layer.lora_variant:
        return "DoRA and the like"
    if layer.lora_bias.get(adapters[0]) or getattr(layer, "fan_in_fan_out", False):
        return "a bias of its own, or weights stored the other way round"
    if not is_frozen_linear(layer.base_layer):
        return "its base is in 8 bits, trained, or of another kind"
    return None


def is_lora_layer(module: nn.Module) -> bool:
    """PEFT's, of whatever kind."""
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


@dataclass
class _Group:
    """Layers on one input: the first that is called computes all, the others take theirs."""

    members: Sequence[_FusedForward] = ()
    given: torch.Tensor | None = None
    ready: dict[int, torch.Tensor] = field(default_factory=dict)

    def output(self, member: _FusedForward, x: torch.Tensor) -> torch.Tensor:
        if self.given is x and id(member) in self.ready:
            found = self.ready.pop(id(member))
            if not self.ready:
                self.given = None
            return found
        if member is not self.members[0] or not all(one.is_usable() for one in self.members):
            return member.alone(x)
        outputs = _computed(self.members, x)
        self.ready = {id(one): y for one, y in zip(self.members[1:], outputs[1:], strict=True)}
        self.given = x if self.ready else None
        return outputs[0]


class _FusedForward:
    """The forward pass of one LoRA layer."""

    def __init__(
        self,
        layer: Any,
        group: _Group,
        origins: Origins,
        residents: Residents,
        products: Products,
    ):
        self.layer = layer
        self.origins = origins
        self.group = group
        self.own_forward: Callable[..., torch.Tensor] = layer.forward
        (self.adapter,) = (name for name in layer.active_adapters if name in layer.lora_A)
        self.base = FrozenLinear(layer.base_layer, residents, products)
        self.is_four_bit = type(layer).__name__ == "Linear4bit"

    def __call__(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if arguments or options or not self.is_usable():
            return self.own_forward(x, *arguments, **options)
        return self.alone(x) if self.drops else self.group.output(self, x)

    def is_usable(self) -> bool:
        layer = self.layer
        return (
            not layer.disable_adapters
            and not layer.merged
            and bool(layer.active_adapters == [self.adapter])
        )

    @property
    def drops(self) -> bool:
        dropout = self.layer.lora_dropout[self.adapter]
        return bool(self.layer.training and getattr(dropout, "p", 0.0) > 0)

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        dropped = self.layer.lora_dropout[self.adapter](x) if self.drops else None
        (y,) = _computed([self], x, dropped)
        return y

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layer
        return layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight

    @property
    def scale(self) -> float:
        return float(self.layer.scaling[self.adapter])


def _computed(
    members: Sequence[_FusedForward], x: torch.Tensor, dropped: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    dtype, out_dtype = _dtypes(x, members[0].is_four_bit)
    return shared_input_lora(
        x,
        [one.base for one in members],
        [one.scale for one in members],
        [factor for one in members for factor in one.factors],
        dtype,
        out_dtype,
        dropped,
        members[0].origins.of(x),
    )


def _dtypes(x: torch.Tensor, is_four_bit: bool) -> tuple[torch.dtype, torch.dtype]:
    """(what a layer computes in, what it gives)"""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x.dtype, x.dtype
    dtype = torch.get_autocast_dtype(device)
    return dtype, x.dtype if is_four_bit else dtype


class _FrozenForward:
    """The forward pass of a frozen layer by itself: one without an adapter, the head, or the one
    inside of a layer that is left to PEFT.
    """

    def __init__(
        self,
        layer: Any,
        residents: Residents,
        products: Products,
        of_outputs: Products | None,
    ):
        self.base = FrozenLinear(layer, residents, products, of_outputs)
        self.own_forward: Callable[..., torch.Tensor] = layer.forward

    def __call__(self, *arguments: torch.Tensor, **options: Any) -> torch.Tensor:
        if len(arguments) != 1 or options:
            return self.own_forward(*arguments, **options)
        (x,) = arguments
        return frozen_output(x, self.base, *_dtypes(x, self.base.is_packed))

    @property
    def is_worth_it(self) -> bool:
        """Whether anything is another than in the layer's own. On a GPU no weight stays, and
        bitsandbytes multiplies a few rows without unpacking at all.
        """
        base = self.base
        is_another = (
            base.products is not BY_TORCH
            or base.of_outputs is not None
            or base.residents.reorder is not None
        )
        return base.module.weight.device.type == "cpu" and (base.is_packed or is_another)


@contextmanager
def fused(
    model: PeftModel,
    fusion: Fusion,
    origins: Origins | None = None,
    residents: Residents | None = None,
    products: Products = BY_TORCH,
    of_logits: Products | None = None,
) -> Iterator[None]:
    """The layers of a plan computed as one operation, while the context lasts; frozen layers by
    themselves with the same weights that stay, by the same products.

    Args:
        origins: how inputs came about that need not be kept.
        residents: frozen weights that stay.
        products: by what frozen weights are multiplied.
        of_logits: by what those of a frozen head are to make logits, where that is another.
    """
    origins, residents = origins or Origins(), residents or Residents()
    head = None if of_logits is None else model.get_base_model().get_output_embeddings()
    with ExitStack() as stack:
        for layer in filter(is_frozen_linear, model.modules()):
            of_outputs = of_logits if layer is head else None
            alone = _FrozenForward(layer, residents, products, of_outputs)
            if alone.is_worth_it:
                stack.enter_context(replaced_forward(layer, alone))
        for names in fusion.groups:
            group = _Group()
            layers = [model.get_submodule(name) for name in names]
            members = [
                _FusedForward(layer, group, origins, residents, products) for layer in layers
            ]
            group.members = members
            for layer, member in zip(layers, members, strict=True):
                stack.enter_context(replaced_forward(layer, member))
        yield
