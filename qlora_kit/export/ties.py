"""Parameters that share one tensor, and whether they still do after the merge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from qlora_kit.errors import AdapterError
from qlora_kit.export.checkpoint import Checkpoint
from qlora_kit.export.delta import SavedAdapter
from qlora_kit.export.names import NameMap, module_of
from qlora_kit.model.skeleton import Skeleton


@dataclass(frozen=True)
class Ties:
    """Tied parameters; each pair is (target, source), for example (head, embedding)."""

    kept: tuple[tuple[str, str], ...]
    """Still one tensor; it is written once."""
    broken: tuple[tuple[str, str], ...]
    """One tensor in the base, two now."""
    duplicates: frozenset[str]
    """Parameters that the checkpoint repeats although they are tied."""
    apart: bool
    """Whether the base declares a tie that its own tensors do not have."""

    @property
    def config_ties(self) -> bool:
        """What the merged config has to say."""
        return bool(self.kept) and not self.broken and not self.apart

    def members(self, stored: str) -> Iterator[tuple[str, str]]:
        """Of the tensor stored for parameter `stored`: every parameter that it has to be written
        for, and the one whose changes apply to that.
        """
        for target, source in self.kept:
            if stored in (target, source):
                yield stored, source
                return
        for target, source in self.broken:
            if stored in (target, source):
                yield from ((source, source), (target, target))
                return
        yield stored, stored


def resolve_ties(
    skeleton: Skeleton, checkpoint: Checkpoint, names: NameMap, adapter: SavedAdapter | None
) -> Ties:
    """Which ties the base really has, and which of them the adapter breaks.

    An adapter breaks a tie by changing one side alone. Rows trained for new tokens do not: PEFT
    gives both sides the same.
    """
    tensors = {parameter: name for name, parameter in names.parameters.items()}
    kept, broken, duplicates, apart = [], [], set(), False
    for target, source in skeleton.model.all_tied_weights_keys.items():
        if target in tensors and source in tensors:
            one, other = (checkpoint.tensor(tensors[name]) for name in (target, source))
            if not torch.equal(one, other):
                apart = True  # transformers leaves them apart as well
                continue
            duplicates.add(target)
        if adapter is not None and _breaks(adapter, target, source):
            broken.append((target, source))
        else:
            kept.append((target, source))
    return Ties(tuple(kept), tuple(broken), frozenset(duplicates), apart)


def _breaks(adapter: SavedAdapter, target: str, source: str) -> bool:
    if adapter.config.ensure_weight_tying:
        return False
    sides = {module_of(target), module_of(source)}
    return bool(
        sides & set(adapter.lora)
        or {target, source} & set(adapter.replaced)
        or module_of(target) in adapter.rows
    )


@dataclass(frozen=True)
class Vocabulary:
    """How many rows embedding and head have after the merge."""

    num_rows: int
    parameters: frozenset[str]
    """Their weights."""
    grown: bool


def resolve_vocabulary(skeleton: Skeleton, adapter: SavedAdapter, num_tokens: int) -> Vocabulary:
    """Embedding and head grow where the tokenizer knows more tokens than they have rows.

    Raises:
        AdapterError: the head has a bias, whose new entries nobody saved.
    """
    model = skeleton.model
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    assert isinstance(ends[0], nn.Module)
    old_rows = len(ends[0].get_parameter("weight"))
    names = {
        f"{name}.weight" for name, module in model.named_modules() if any(module is e for e in ends)
    }
    num_rows = old_rows
    for parameter in names & set(adapter.replaced):
        num_rows = max(num_rows, adapter.replaced[parameter].shape[0])
    num_rows = max(num_rows, num_tokens)
    grown = num_rows > old_rows
    if grown and getattr(ends[1], "bias", None) is not None:
        raise AdapterError(
            f"{adapter.folder}: the vocabulary grew, and the head of this model has a bias, whose "
            "new entries an adapter does not hold."
        )
    return Vocabulary(num_rows, frozenset(names), grown)
