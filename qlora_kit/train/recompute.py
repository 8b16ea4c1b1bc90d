"""Which layers recompute their activations in the backward pass: as few as the memory asks for.

What a forward pass keeps is counted, on short sequences, tensor by tensor; it grows with the
length of the sequence (with its square where attention keeps its scores), so three lengths tell it
for every other one. The first layers recompute: their turn in the backward pass comes when all
others have given their memory back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.errors import ModelError
from qlora_kit.model.fused.residents import Residents
from qlora_kit.out_of_memory import is_out_of_memory
from qlora_kit.train.memory import cgroup_limit_bytes
from qlora_kit.train.snapshot import put_random_state_back, random_state

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.recipe import TrainSpec
    from qlora_kit.train.batching import Batching
    from qlora_kit.train.loader import AnyCollator
    from qlora_kit.train.surroundings import Surroundings

_MIB = 2**20
_LENGTHS = (16, 32, 64)
_SHARE_OF_GPU, _SHARE_OF_HOST = 0.85, 0.6
_WORKING_BYTES = 512 * _MIB


@dataclass(frozen=True)
class Growth:
    """Bytes for one sequence of n tokens: constant + linear · n + square · n²."""

    constant: float
    linear: float
    square: float

    @classmethod
    def through(cls, lengths: Sequence[int], bytes_: Sequence[int]) -> Growth:
        """The one parabola through three points."""
        (x0, x1, x2), (y0, y1, y2) = lengths, bytes_
        first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        square = (second - first) / (x2 - x0)
        linear = first - square * (x0 + x1)
        return cls(y0 - linear * x0 - square * x0**2, linear, square)

    def at(self, num_tokens: int) -> float:
        return self.constant + self.linear * num_tokens + self.square * num_tokens**2


@dataclass(frozen=True)
class Kept:
    """What the forward pass of one sequence keeps for the backward pass."""

    layers: tuple[Growth, ...]
    """Of each layer, in order, beside its input."""
    inputs: Growth
    """Of the input of one layer, which is kept where the layer recomputes."""
    rest: Growth
    """Of what stands before and behind the layers."""

    def peak_bytes(self, num_recomputing: int, num_sequences: int, num_tokens: int) -> float:
        """The most that is kept at once where the first layers recompute.

        Args:
            num_tokens: of the longest sequence, to which the others are padded.
        """
        of_layers = [one.at(num_tokens) for one in self.layers]
        inputs = num_recomputing * self.inputs.at(num_tokens)
        at_the_end = inputs + sum(of_layers[num_recomputing:])
        under_way = inputs + max(of_layers[:num_recomputing], default=0.0)
        most = max(at_the_end, under_way) + self.rest.at(num_tokens)
        return num_sequences * most

    def fewest(self, num_sequences: int, num_tokens: int, free_bytes: float) -> int:
        """How many layers have to recompute, so that the rest fits; all where nothing does."""
        for count in range(len(self.layers)):
            if self.peak_bytes(count, num_sequences, num_tokens) <= free_bytes:
                return count
        return len(self.layers)


def recomputing_layers(model: nn.Module) -> list[Any]:
    """The layers that can recompute, in the order in which they come."""
    return [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]


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


def measure_kept(model: nn.Module, run: Callable[[int], torch.Tensor]) -> Kept:
    """Count what training passes keep.

    Args:
        run: passes one sequence of so many tokens through the model, and returns the loss.
    """
    layers = recomputing_layers(model)
    counts = [_count(model, layers, partial(run, length)) for length in _LENGTHS]
    by_layer = zip(*(one.layers for one in counts), strict=True)
    return Kept(
        tuple(Growth.through(_LENGTHS, sizes) for sizes in by_layer),
        Growth.through(_LENGTHS, [one.inputs for one in counts]),
        Growth.through(_LENGTHS, [one.rest for one in counts]),
    )


@dataclass(frozen=True)
class _Counted:
    layers: tuple[int, ...]
    inputs: int
    rest: int


def _count(model: nn.Module, layers: Sequence[Any], run: Callable[[], torch.Tensor]) -> _Counted:
    """Bytes of every storage that is kept, counted where it is met first."""
    owned = {_storage(one) for one in (*model.parameters(), *model.buffers())}
    seen: set[int] = set()
    alive: list[torch.Tensor] = []
    given_to: dict[int, int] = {}
    by_layer = [0] * len(layers)
    inputs = [0] * len(layers)
    rest = 0
    now: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal rest
        storage = _storage(tensor)
        if storage in owned or storage in seen:
            return tensor.detach()
        seen.add(storage)
        alive.append(tensor)
        size = tensor.untyped_storage().nbytes()
        owner = given_to.get(storage, now[-1] if now else None)
        if owner is None:
            rest += size
        else:
            by_layer[owner] += size
        # Not itself: an output that its own node keeps would keep that node, and all before it.
        return tensor.detach()

    def entering(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            given = next(
                one for one in (*arguments, *options.values()) if isinstance(one, torch.Tensor)
            )
            inputs[number] = given.untyped_storage().nbytes()
            given_to.setdefault(_storage(given), number)  # its own, whoever keeps it
            alive.append(given)
            now.append(number)

        return hook

    def leaving(*_: Any) -> None:
        now.pop()

    handles = [
        one.register_forward_pre_hook(entering(n), with_kwargs=True) for n, one in enumerate(layers)
    ]
    handles += [one.register_forward_hook(leaving) for one in layers]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
            run()
    finally:
        for handle in handles:
            handle.remove()
        alive.clear()  # autograd holds the hook, which holds these, and they their graph
    return _Counted(tuple(by_layer), max(inputs, default=0), rest)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


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
) -> Recompute:
    """As the recipe says; `auto` counts what the longest batch would keep, and lets as few layers
    recompute as there is memory for. All of them where nobody can tell.
    """
    layers = recomputing_layers(model)
    if spec.gradient_checkpointing is False:
        return Recompute(model, 0, 0)
    if spec.gradient_checkpointing is True:
        return Recompute(model, len(layers), len(layers))
    longest = batches.longest(spec.per_device_train_batch_size)
    if not model.get_base_model().supports_gradient_checkpointing:
        return Recompute(model, 0, 0, "this architecture cannot")
    if is_sharded or not layers or not longest:
        return Recompute(model, len(layers), len(layers), "what a layer keeps is not known here")
    try:
        kept = measure_kept(model, lambda n: loss_of_length(model, batches.collator, n, around))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Recompute(model, len(layers), len(layers), "memory ran out on 64 tokens")
    num_tokens = max(item.num_tokens for item in longest)
    shape = (len(longest), num_tokens)
    free = _free_bytes(around, spec) - _bytes_of_update(model)
    count = kept.fewest(*shape, free)
    return Recompute(
        model,
        count,
        len(layers),
        f"the longest batch, {len(longest)} × {num_tokens:,} tokens, keeps "
        f"{kept.peak_bytes(0, *shape) / _MIB:,.0f} MiB without and "
        f"{kept.peak_bytes(len(layers), *shape) / _MIB:,.0f} MiB with recomputing; "
        f"{max(free, 0) / _MIB:,.0f} MiB are free for it",
    )


def loss_of_length(
    model: PeftModel, collator: AnyCollator, length: int, around: Surroundings
) -> torch.Tensor:
    """Of one sequence of that length, the end of which is supervised."""
    ids = tuple(range(1, length + 1))
    labels = (*(IGNORE_INDEX,) * (length - 2), *ids[-2:])
    batch = collator([TokenSequence(ids, labels, "")])
    device = next(model.parameters()).device
    tensors = {
        name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)
    }
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(around.precision)
    before = random_state()
    was_training = model.training
    model.train()
    try:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss: torch.Tensor = model(**tensors, use_cache=False).loss
    finally:
        model.train(was_training)
        put_random_state_back(before)
    return loss


def _free_bytes(around: Surroundings, spec: TrainSpec) -> float:
    """What activations may take: of what is free a part is left to the allocator and to others."""
    if around.hardware.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if spec.max_memory_mib is not None:
            free = min(free, spec.max_memory_mib * _MIB - torch.cuda.memory_reserved())
        return _SHARE_OF_GPU * (free + reserved)
    if spec.max_memory_mib is not None:
        return _SHARE_OF_HOST * (spec.max_memory_mib * _MIB - psutil.Process().memory_info().rss)
    free = psutil.virtual_memory().available
    most = cgroup_limit_bytes()
    if most is not None:
        free = min(free, most - psutil.Process().memory_info().rss)
    return _SHARE_OF_HOST * free / around.processes.count


def _bytes_of_update(model: nn.Module) -> int:
    """Gradients and the optimizer's state, at most, and room for unpacked weights and logits."""
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return 12 * trained + _WORKING_BYTES
