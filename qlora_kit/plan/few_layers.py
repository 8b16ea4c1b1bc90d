"""A trial of a deep model on a few of its layers: what one takes, all that are alike take.

A step is cut where a layer begins, forward and backward. Gone through are the first and the last
layer of the model and of each kind (which may make or let go what all of a kind share), and two
more of each kind, which have to take the same, to the byte, and stand for the others. The whole
step is then put together of these parts, so that its peak is the one that all layers would have
come to.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from qlora_kit.memory.kept import recomputing_layers
from qlora_kit.memory.live import Component, LiveTensors
from qlora_kit.model.fused.attach import Fusion, reasons_left

_OWN_NUMBERS = ("layer_idx", "layer_id", "layer_number", "layer_index")
BEGIN, FORWARD, HEAD, BEHIND, BACKWARD = "begin", "forward", "head", "behind", "backward"
_T = TypeVar("_T")


class NotAlikeError(Exception):
    """Layers that look the same do not take the same, or are not gone through in their order."""


@dataclass(frozen=True)
class FewLayers:
    """Which layers of a model are gone through, and which stand for which."""

    container: nn.ModuleList
    prefix: str
    """Of the names of its layers."""
    layers: tuple[nn.Module, ...]
    """All of them."""
    chosen: tuple[int, ...]
    stands_for: tuple[int, ...]
    """For each of all layers the chosen one that is alike."""
    alike: tuple[tuple[int, int], ...]
    """Chosen ones that have to take the same."""
    config: Any

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has these layers alone, under the names that they have."""
        kept = dict(self.container._modules)
        names = list(kept)
        with ExitStack() as stack:
            stack.callback(self.container._modules.update, kept)
            stack.callback(self.container._modules.clear)
            self.container._modules.clear()
            for one in self.chosen:
                self.container._modules[names[one]] = kept[names[one]]
            for name, value in _lists_by_layer(self.config, len(self.layers)).items():
                stack.callback(setattr, self.config, name, value)
                setattr(self.config, name, type(value)(value[one] for one in self.chosen))
            stack.callback(setattr, self.config, "num_hidden_layers", len(self.layers))
            self.config.num_hidden_layers = len(self.chosen)
            yield

    def of_all(self, of_chosen: Mapping[int, _T]) -> list[_T]:
        """By layer, what is known of the chosen ones. Raises NotAlikeError."""
        for one, other in self.alike:
            if of_chosen[one] != of_chosen[other]:
                raise NotAlikeError(f"layers {one} and {other} do not take the same")
        return [of_chosen[one] for one in self.stands_for]


def few_layers(model: nn.Module, config: Any, num_recomputing: int = 0) -> FewLayers | None:
    """The fewest that tell of all; None where those are most of them, or it cannot be seen.

    Args:
        config: of the text model.
        num_recomputing: how many of the first layers do.
    """
    layers = tuple(recomputing_layers(model))
    found = _container_of(model, layers)
    if found is None or getattr(config, "num_hidden_layers", None) != len(layers):
        return None
    prefix, container = found
    lists = _lists_by_layer(config, len(layers)).values()
    ends = {0, len(layers) - 1}
    by_kind: dict[Hashable, list[int]] = {}
    for number, layer in enumerate(layers):
        kind = (_kind_of(layer), *(repr(one[number]) for one in lists), number < num_recomputing)
        if number not in ends:
            by_kind.setdefault(kind, []).append(number)
    chosen = ends | {one for alike in by_kind.values() for one in (*alike[:3], alike[-1])}
    if 2 * len(chosen) > len(layers):
        return None
    second = {number: alike[1] for alike in by_kind.values() for number in alike[1:-1]}
    stands_for = tuple(second.get(number, number) for number in range(len(layers)))
    pairs = tuple((alike[1], alike[2]) for alike in by_kind.values() if len(alike) > 3)
    return FewLayers(container, prefix, layers, tuple(sorted(chosen)), stands_for, pairs, config)


def _container_of(
    model: nn.Module, layers: Sequence[nn.Module]
) -> tuple[str, nn.ModuleList] | None:
    """The list that holds just these, with its name."""
    for name, one in model.named_modules():
        if isinstance(one, nn.ModuleList) and len(one) == len(layers) > 0:
            same = zip(one, layers, strict=True)
            if all(mine is other for mine, other in same):
                return f"{name}.", one
    return None


def _lists_by_layer(config: Any, count: int) -> dict[str, Any]:
    """What a configuration says of each layer."""
    known = vars(config).items()
    return {name: one for name, one in known if isinstance(one, list | tuple) and len(one) == count}


def _kind_of(layer: nn.Module) -> Hashable:
    """All that can be seen of a layer but the values of its weights and its number."""
    return tuple(
        (name, type(module).__qualname__, _settings(module), _tensors(module))
        for name, module in layer.named_modules()
    )


def _settings(module: nn.Module) -> Hashable:
    return tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str) and name not in _OWN_NUMBERS
    )


def _tensors(module: nn.Module) -> Hashable:
    return tuple(
        (name, type(one).__name__, tuple(one.shape), str(one.dtype), one.requires_grad)
        for name, one in module.named_parameters(recurse=False)
    )


def in_place(few: FewLayers | None) -> AbstractContextManager[None]:
    """The few in place of all; None: all of them are."""
    return nullcontext() if few is None else few.in_place()


def among(few: FewLayers | None, count: int) -> int:
    """How many of the chosen layers recompute, where the first `count` of all do."""
    return count if few is None else sum(one < count for one in few.chosen)


def fusion_of_all(fusion: Fusion, few: FewLayers, model: Any) -> Fusion:
    """With the layers that others have stood for, under their names."""
    by_layer: dict[int, list[tuple[str, ...]]] = {one: [] for one in few.chosen}
    others = []
    for group in fusion.groups:
        places = {_layer_of(name, few.prefix) for name in group}
        (place,) = places if len(places) == 1 else (None,)
        if place is None:
            others.append(group)
        else:
            start = f"{few.prefix}{place}."
            by_layer[place].append(tuple(name.removeprefix(start) for name in group))
    whole = [
        tuple(f"{few.prefix}{number}.{name}" for name in group)
        for number, groups in enumerate(few.of_all(by_layer))
        for group in groups
    ]
    return Fusion((*whole, *others), reasons_left(model))


def _layer_of(name: str, prefix: str) -> int | None:
    number = name.removeprefix(prefix).partition(".")[0]
    return int(number) if name.startswith(prefix) and number.isdecimal() else None


@dataclass(frozen=True)
class _Taken:
    """From one cut of a step to the next: bytes by component, beside those at its beginning."""

    peak: Mapping[Component, int]
    after: Mapping[Component, int]
    gone_bytes: int
    counted: Mapping[str, int]


@dataclass(frozen=True)
class _Part:
    kind: str
    layer: int
    taken: _Taken


class Course:
    """A step, cut into parts while it is gone through.

    Its figures are those of a step through all layers; where a few have stood for all they raise
    NotAlikeError if that cannot be told.
    """

    def __init__(
        self,
        few: FewLayers | None,
        live: LiveTensors | None = None,
        counts: Callable[[], Mapping[str, int]] = dict,
    ):
        """Args: few: in place while the step is gone through; None: all layers are.
        counts: what has been done so far, by name.
        """
        self.few = few
        self.live = live
        self.counts = counts
        self.parts: list[_Part] = []
        self._open: tuple[str, int] | None = None
        self._before: tuple[Mapping[Component, int], int, Mapping[str, int]] = ({}, 0, {})
        self._start: Mapping[Component, int] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Go through it within; `cut` where a pass begins, and behind its loss."""
        with ExitStack() as stack:
            if self.few is not None:
                for number in self.few.chosen:
                    layer = self.few.layers[number]
                    stack.callback(layer.register_forward_pre_hook(self._entering(number)).remove)
                    stack.callback(layer.register_forward_hook(self._leaving(number)).remove)
            self.cut(BEGIN)
            self._start = self._before[0]
            yield
            self._close()

    def cut(self, kind: str, layer: int = -1) -> None:
        """Here another part begins."""
        self._close()
        self._open = (kind, layer)
        now: Mapping[Component, int] = {}
        gone = 0
        if self.live is not None:
            now, gone = dict(self.live.now), self.live.gone_bytes
            self.live.forget_peak()
        self._before = (now, gone, dict(self.counts()))

    @property
    def peak(self) -> dict[Component, int]:
        """Of the last pass, at the moment when most is alive."""
        now, most = dict(self._start), dict(self._start)
        for part in self._whole():
            if part.kind == BEGIN:
                most = now
            here = _sum(now, part.taken.peak)
            if sum(here.values()) > sum(most.values()):
                most = here
            now = _sum(now, part.taken.after)
        return {name: size for name, size in most.items() if size}

    @property
    def passing_bytes(self) -> int:
        """Made and let go again in the forward part of the last pass."""
        passing, is_forward = 0, False
        for part in self._whole():
            if part.kind in (BEGIN, BEHIND):
                is_forward = part.kind == BEGIN
                passing = 0 if is_forward else passing
            passing += part.taken.gone_bytes * is_forward
        return passing

    def most_added(self, component: Component) -> int:
        """Bytes that the forward passes leave."""
        added = [part.taken.after.get(component, 0) for part in self._whole()]
        return sum(one for one in added if one > 0)

    @property
    def counted(self) -> dict[str, int]:
        """What was done, by name."""
        total: dict[str, int] = {}
        for part in self._whole():
            total = _sum(total, part.taken.counted)
        return total

    def _whole(self) -> list[_Part]:
        """The parts of a step through all layers."""
        if self.few is None:
            return self.parts
        found: list[_Part] = []
        at = 0
        while at < len(self.parts):
            is_layer = self.parts[at].kind in (FORWARD, BACKWARD)
            run = self.parts[at : at + (len(self.few.chosen) if is_layer else 1)]
            found += _of_all(self.few, run) if is_layer else run
            at += len(run)
        return found

    def _entering(self, number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not _is_backward():
                self.cut(FORWARD, number)

        return hook

    def _leaving(self, number: int) -> Callable[..., None]:
        assert self.few is not None
        is_last = number == self.few.chosen[-1]

        def hook(_: Any, __: Any, output: Any) -> None:
            if _is_backward():
                return
            handed_on = output[0] if isinstance(output, tuple) else output
            if handed_on.requires_grad:
                handed_on.register_hook(lambda _: self.cut(BACKWARD, number))
            if is_last:
                self.cut(HEAD)

        return hook

    def _close(self) -> None:
        if self._open is None:
            return
        now, gone, counts = self._before
        peak: Mapping[Component, int] = {}
        after: Mapping[Component, int] = {}
        if self.live is not None:
            peak, after = _less(self.live.peak, now), _less(self.live.now, now)
            gone = self.live.gone_bytes - gone
        taken = _Taken(peak, after, gone, _less(self.counts(), counts))
        self.parts.append(_Part(*self._open, taken))
        self._open = None


def _of_all(few: FewLayers, run: Sequence[_Part]) -> list[_Part]:
    """A part for each of all layers, in the order in which they are gone through."""
    kind = run[0].kind
    wanted = few.chosen if kind == FORWARD else few.chosen[::-1]
    if [(one.kind, one.layer) for one in run] != [(kind, layer) for layer in wanted]:
        raise NotAlikeError("the layers are not gone through one after the other")
    taken = few.of_all({one.layer: one.taken for one in run})
    parts = [_Part(kind, number, one) for number, one in enumerate(taken)]
    return parts if kind == FORWARD else parts[::-1]


def _is_backward() -> bool:
    """Whether a backward pass is under way, in which layers may compute once more."""
    return torch._C._current_graph_task_id() != -1


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def _less(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """Without what is the same."""
    differences = {name: one.get(name, 0) - other.get(name, 0) for name in {**one, **other}}
    return {name: value for name, value in differences.items() if value}
