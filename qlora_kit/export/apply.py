"""The merged tensors of a base and its adapter, one at a time, in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from qlora_kit.errors import AdapterError
from qlora_kit.export.delta import SavedAdapter, merge_lora, merge_lora_bias
from qlora_kit.export.dense import DenseTensor
from qlora_kit.export.names import module_of
from qlora_kit.export.ties import Ties, Vocabulary
from qlora_kit.model.skeleton import Skeleton


@dataclass(frozen=True)
class MergedTensor:
    """One tensor to be written."""

    name: str
    parameter: str | None
    value: torch.Tensor
    base: torch.Tensor | None
    """The weight before its low-rank update; None where it had none."""


@dataclass
class Merger:
    """Applies an adapter to dense tensors, and knows what of it is still to be applied."""

    adapter: SavedAdapter
    skeleton: Skeleton
    ties: Ties
    vocabulary: Vocabulary
    _applied: set[str] = field(default_factory=set)

    def merge(self, tensors: Iterable[DenseTensor]) -> Iterator[MergedTensor]:
        """Merge every tensor of the base.

        Raises:
            AdapterError: an update does not fit, or something of the adapter found no tensor.
        """
        for dense in tensors:
            if dense.parameter is None:
                yield MergedTensor(dense.name, None, dense.value, None)
                continue
            if dense.parameter in self.ties.duplicates:
                continue
            for parameter, changed_as in self.ties.members(dense.parameter):
                name = dense.name if parameter == dense.parameter else parameter
                value, base = self._apply(changed_as, dense.value)
                yield MergedTensor(name, parameter, value, base)
        self._require_all_applied()

    def _apply(
        self, parameter: str, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        module = module_of(parameter)
        base = None
        if parameter in self.adapter.replaced:
            self._applied.add(parameter)
            value = self._fitting(parameter, self.adapter.replaced[parameter].float(), value)
        if parameter == f"{module}.weight":
            if module in self.adapter.lora:
                self._applied.add(module)
                base = value
                value = merge_lora(self.adapter, module, self.skeleton, base)
            value = self._set_rows(parameter, module, value)
        elif parameter == f"{module}.bias" and self._has_bias_update(module):
            value = merge_lora_bias(self.adapter, module, self.skeleton, value)
        return value, base

    def _set_rows(self, parameter: str, module: str, value: torch.Tensor) -> torch.Tensor:
        """Grow to the vocabulary, and put the rows of trained tokens in place."""
        rows = self.adapter.rows.get(module)
        if rows is None and parameter in self.vocabulary.parameters:
            # The other side of a tie that something else has broken follows the source's rows.
            sources = [module_of(s) for t, s in self.ties.broken if t == parameter]
            rows = next((self.adapter.rows[s] for s in sources if s in self.adapter.rows), None)
        old = value.shape[0]
        if parameter in self.vocabulary.parameters and self.vocabulary.num_rows > old:
            new_ids = range(old, self.vocabulary.num_rows)
            if rows is None or not set(new_ids) <= set(rows.token_ids):
                raise AdapterError(
                    f"{self.adapter.folder}: the vocabulary grew from {old} to "
                    f"{self.vocabulary.num_rows}, but the adapter does not hold all the new rows "
                    f"of {module}; save it with save_embedding_layers=True."
                )
            value = torch.cat([value, value.new_zeros(len(new_ids), value.shape[1])])
        if rows is None:
            return value
        self._applied.add(f"{module}:rows")
        return value.index_copy(0, torch.tensor(rows.token_ids), rows.values)

    def _fitting(self, parameter: str, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        may_grow = parameter in self.vocabulary.parameters
        if new.shape != old.shape and not (may_grow and new.shape[1:] == old.shape[1:]):
            raise AdapterError(
                f"{self.adapter.folder}: {parameter} is {tuple(new.shape)} in the adapter and "
                f"{tuple(old.shape)} in the base."
            )
        return new

    def _has_bias_update(self, module: str) -> bool:
        return any(key.endswith("lora_B.bias") for key in self.adapter.lora.get(module, ()))

    def _require_all_applied(self) -> None:
        wanted = {
            *self.adapter.lora,
            *self.adapter.replaced,
            *(f"{module}:rows" for module in self.adapter.rows),
        }
        for target, source in self.ties.kept:  # what PEFT saved for both sides of a tie
            wanted -= {target, module_of(target), f"{module_of(target)}:rows"} - {source}
        left = sorted(wanted - self._applied)
        if left:
            raise AdapterError(
                f"{self.adapter.folder}: nothing in the base takes {', '.join(left[:3])}; the "
                "adapter was made for another one."
            )
