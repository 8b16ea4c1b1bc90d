"""Which layers recompute their activations in the backward pass: as few as the memory asks for.

The first layers recompute: their turn in the backward pass comes when all others have given their
memory back. How much is kept is counted in qlora_kit/memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn

from qlora_kit.errors import ModelError
from qlora_kit.memory.kept import recomputing_layers
from qlora_kit.memory.process import resident_bytes
from qlora_kit.memory.ways import (
    bytes_of_update,
    lengths_of_rows,
    room_for_kept,
    room_for_unpacked,
)
from qlora_kit.model.fused.residents import Residents
from qlora_kit.out_of_memory import is_out_of_memory
from qlora_kit.train.known_kept import known_or_counted
from qlora_kit.train.memory import cgroup_limit_bytes

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.recipe import TrainSpec
    from qlora_kit.train.batching import Batching
    from qlora_kit.train.surroundings import Surroundings

_MIB = 2**20


def recompute_first(model: nn.Module, count: int) -> None:
    """Let the first layers recompute, and no others."""
    for number, layer in enumerate(recomputing_layers(model)):
        layer.gradient_checkpointing = number < count


@contextmanager
def able_to_recompute(model: PeftModel, asked: bool | str = True) -> Iterator[None]:
    """Prepare the layers to recompute, which none does yet; none does afterwards.

    Raises:
        ModelError: that is asked for, and this architecture cannot.
    """
    is_able = model.get_base_model().supports_gradient_checkpointing
    if asked is True and not is_able:
        raise ModelError(
            f"{model.get_base_model().config.model_type} cannot recompute activations; set "
            "train.gradient_checkpointing: auto, or false."
        )
    if not asked or not is_able:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Which only the reentrant way needs: the gradient of the embeddings is for nobody.
    model.get_base_model().disable_input_require_grads()
    recompute_first(model, 0)
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@dataclass
class Recompute:
    """How many layers recompute now, of how many."""

    model: nn.Module
    count: int
    num_layers: int
    reason: str = ""
    """Of the choice, for people; empty where the recipe made it."""
    is_forced: bool = False
    """Whether memory ran out with what was chosen."""
    residents: Residents = field(default_factory=Residents)

    def __post_init__(self) -> None:
        recompute_first(self.model, self.count)

    def can_give_more(self) -> bool:
        return self.count < self.num_layers or self.residents.num_bytes > 0

    def all(self) -> None:
        """Let every layer recompute from here on, and keep no unpacked weights; the numbers stay
        the same.
        """
        self.residents.release()
        self.count, self.is_forced = self.num_layers, True
        recompute_first(self.model, self.count)


def choose_recompute(
    model: PeftModel,
    batches: Batching,
    spec: TrainSpec,
    around: Surroundings,
    is_sharded: bool,
    residents: Residents,
    key: str | None = None,
) -> Recompute:
    """As the recipe says; `auto` counts what the longest batch would keep, and lets as few layers
    recompute as there is memory for. All of them where nobody can tell.

    Args:
        residents: on a CPU is given what is left where none recomputes.
        key: see `known_or_counted`.
    """
    asked, device = spec.gradient_checkpointing, around.hardware.device
    layers = recomputing_layers(model)
    if asked is True:
        return Recompute(model, len(layers), len(layers))
    if asked is False and device != "cpu":
        return Recompute(model, 0, 0)
    if not model.get_base_model().supports_gradient_checkpointing:
        return Recompute(model, 0, 0, "this architecture cannot")
    most = 0 if asked is False else len(layers)
    longest = batches.longest(spec.per_device_train_batch_size)
    if is_sharded or not layers or not longest:
        return Recompute(model, most, most, "what a layer keeps is not known here")
    try:
        kept = known_or_counted(model, batches, around, key)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Recompute(model, most, most, "memory ran out on 64 tokens")
    lengths = lengths_of_rows(batches.attended(longest))
    update = bytes_of_update(model, spec.optim)
    entries = model.config.get_text_config().vocab_size
    free = _free_bytes(around, spec)
    room = room_for_kept(free, update, entries, sum(lengths), device)
    count = min(kept.fewest(lengths, room), most)
    stays = room_for_unpacked(model, room, kept, count, lengths, device, residents.reorders)
    residents.give(stays)
    return Recompute(
        model,
        count,
        most,
        f"the longest batch, {sum(lengths):,} tokens, keeps "
        f"{kept.peak_bytes(0, lengths) / _MIB:,.0f} MiB without and "
        f"{kept.peak_bytes(len(layers), lengths) / _MIB:,.0f} MiB with recomputing; "
        f"{max(room, 0) / _MIB:,.0f} MiB are free for it"
        + f", of them {stays.told()}"
        * bool(stays.num_bytes),
        residents=residents,
    )


def _free_bytes(around: Surroundings, spec: TrainSpec) -> float:
    """What this process may still take."""
    if around.hardware.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if spec.max_memory_mib is not None:
            free = min(free, spec.max_memory_mib * _MIB - torch.cuda.memory_reserved())
        return free + reserved
    if spec.max_memory_mib is not None:
        return spec.max_memory_mib * _MIB - resident_bytes()
    free = psutil.virtual_memory().available
    most = cgroup_limit_bytes()
    if most is not None:
        free = min(free, most - resident_bytes())
    return free / around.processes.count
