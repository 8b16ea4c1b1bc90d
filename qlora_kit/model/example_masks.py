"""Masks of layers that see only what is near (a sliding window), made for one example at a time.

A mask over a row of many examples takes the square of the row, and so does attention under it. What
goes through the model in its place has the mask's shape and no memory; attention knows it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.masking_utils import sdpa_mask

_BAND = 1024


class ExampleMasks:
    """Of one pass through the model: what each example may see of itself."""

    def __init__(self, num_rows: int, local_size: int, options: dict[str, Any]):
        """Args: local_size: tokens that are near; options: as transformers' `sdpa_mask` takes
        them.
        """
        self.num_rows = num_rows
        self.local_size = local_size
        self.options = options
        self.mask_function: Callable[..., Any] = options["mask_function"]
        self._made: dict[tuple[int, int, int], torch.Tensor | None] = {}
        self._are_windows: bool | None = None

    def of(self, row: int, start: int, length: int) -> torch.Tensor | None:
        """(1, 1, length, length), true where a token is seen; None: all that came before."""
        row = row % self.num_rows
        key = (row, start, length)
        if key not in self._made:
            self._made[key] = self._of(*key)
        return self._made[key]

    def are_windows(self, places: Iterable[tuple[int, int, int]]) -> bool:
        """Whether in each (row, start, length) a token sees the `local_size` that end with it, as a
        kernel can be told; asked for once, of all examples of the pass.
        """
        if self._are_windows is None:
            self._are_windows = all(self._is_window(*one) for one in places)
        return self._are_windows

    def _is_window(self, row: int, start: int, length: int) -> bool:
        """A band of rows at a time: the whole would take the square of the example."""
        if length <= self.local_size:
            return self.of(row, start, length) is None
        for first in range(0, length, _BAND):
            count = min(_BAND, length - first)
            seen = self._mask(row, start, (first, count), length)
            if not torch.equal(seen[0, 0], _window((first, count), length, self.local_size, seen)):
                return False
        return True

    def _of(self, row: int, start: int, length: int) -> torch.Tensor | None:
        mask = self._mask(row, start, (0, length), length)
        if isinstance(mask, FakeTensor):  # does not tell
            return None if length <= self.local_size else mask
        causal = _window((0, length), length, length, mask)
        return None if torch.equal(mask[0, 0], causal) else mask

    def _mask(self, row: int, start: int, of: tuple[int, int], length: int) -> torch.Tensor:
        """(1, 1, count, length) of the `of[1]` tokens from `of[0]` on."""
        row, (first, count) = row % self.num_rows, of

        def within(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return self.mask_function(batch + row, head, query + (start + first), key + start)

        size = {"batch_size": 1, "q_length": count, "kv_length": length}
        named = {"mask_function": within, "allow_is_causal_skip": False, "local_size": None}
        mask: torch.Tensor = sdpa_mask(**{**self.options, **size, **named})
        return mask


def _window(of: tuple[int, int], length: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """(count, length): of each of these tokens the `size` that end with it."""
    first, count = of
    seen = torch.ones((count, length), dtype=torch.bool, device=like.device).tril(first)
    return seen.triu(first + 1 - size)


class _Placeholders:
    """What stands for which masks, as long as it is alive."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[StorageWeakRef, ExampleMasks]] = {}

    def add(self, masks: ExampleMasks, shape: tuple[int, ...], device: Any) -> torch.Tensor:
        # False: who took it for a mask would see nothing, and the probe tell it from the others.
        one = torch.zeros((1,) * len(shape), dtype=torch.bool, device=device)
        reference = StorageWeakRef(one.untyped_storage())
        self._of = {cdata: kept for cdata, kept in self._of.items() if not kept[0].expired()}
        self._of[reference.cdata] = (reference, masks)
        return one.expand(shape)

    def of(self, mask: torch.Tensor) -> ExampleMasks | None:
        found = self._of.get(mask.untyped_storage()._cdata)
        return None if found is None or found[0].expired() else found[1]


_placeholders = _Placeholders()


def placeholder_of(
    num_rows: int, num_tokens: int, local_size: int, options: dict[str, Any]
) -> torch.Tensor:
    """(B, 1, S, S), without memory of its own."""
    masks = ExampleMasks(num_rows, local_size, options)
    shape = (num_rows, 1, num_tokens, num_tokens)
    return _placeholders.add(masks, shape, options["device"])


def masks_behind(mask: torch.Tensor | None) -> ExampleMasks | None:
    """What a placeholder stands for; None: it is a mask, or there is none."""
    return None if mask is None else _placeholders.of(mask)
