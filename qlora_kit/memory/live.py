"""Bytes of the tensors that are alive, by what they are for, while operations run."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_kit.memory.allocator import is_of_the_heap

Component = str
ACTIVATIONS, LOGITS, UNPACKED, GRADIENTS = "activations", "logits", "unpacked weights", "gradients"


class LiveTensors(TorchDispatchMode):
    """Counts every storage once, from the operation that makes it until the last tensor on it is
    gone. What an operation takes and gives back inside is not seen.

    Under FakeTensorMode nothing is computed and no memory taken, and the counts are the same.
    """

    def __init__(self, num_entries: int = 0):
        """Args: num_entries: of the vocabulary, by which logits are known."""
        super().__init__()
        self.num_entries = num_entries
        self.now: Counter[Component] = Counter()
        self.peak: Mapping[Component, int] = {}
        self.gone_bytes = 0
        """Of all that was made or held and is gone again, blocks of the C library's heap alone."""
        self._total = self._most = 0
        self._known: dict[int, tuple[Component, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor):
                self._meet(one, function)
        return made

    def hold(self, tensors: Iterable[torch.Tensor], component: Component) -> None:
        """Count tensors that are there already, or under another name than so far."""
        for one in tensors:
            storage = one.untyped_storage()
            known = self._known.get(storage._cdata)
            if known is None:
                self._count(storage, component)
            elif known[0] != component:
                was, size = known
                self._known[storage._cdata] = component, size
                self.now[was] -= size
                self.now[component] += size

    def pass_by(self, num_bytes: int, component: Component) -> None:
        """Count what is there for a moment, and no tensor that is seen."""
        self.now[component] += num_bytes
        self._total += num_bytes
        self._look()
        self.now[component] -= num_bytes
        self._total -= num_bytes

    @property
    def num_bytes(self) -> int:
        """Alive now."""
        return self._total

    def forget_peak(self) -> None:
        """From here on the peak is a new one."""
        self._most = 0
        self._look()

    def _meet(self, tensor: torch.Tensor, function: Any) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._count(storage, self._component_of(tensor, function))

    def _component_of(self, tensor: torch.Tensor, function: Any) -> Component:
        if function.namespace == "bitsandbytes" and "dequantize" in function.__name__:
            return UNPACKED
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self.num_entries > 0
        return LOGITS if is_logits else ACTIVATIONS

    def _count(self, storage: torch.UntypedStorage, component: Component) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known[key] = component, size
        weakref.finalize(storage, self._gone, key)
        self.now[component] += size
        self._total += size
        self._look()

    def _look(self) -> None:
        if self._total > self._most:
            self._most = self._total
            self.peak = dict(self.now)

    def _gone(self, key: int) -> None:
        component, size = self._known.pop(key)
        self.now[component] -= size
        self._total -= size
        if is_of_the_heap(size):
            self.gone_bytes += size
