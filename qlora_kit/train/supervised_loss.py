"""The loss of a causal language model without logits that nobody needs.

Of a batch only the supervised places are given to the head, a chunk at a time, and where the head
is frozen its gradient is taken in the forward pass, so that logits are never kept: exact, and in
memory of one chunk instead of the whole batch times the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from qlora_kit.data.sequences import IGNORE_INDEX
from qlora_kit.model.by_example import keeping_positions
from qlora_kit.model.fused.at_places import Places, Wanted
from qlora_kit.model.fused.replaced import replaced_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = Callable[[torch.Tensor], torch.Tensor]
"""(N, H) hidden states → (N, V) logits"""

# Float32 logits of one chunk; their gradient takes as much again.
_CHUNK_BYTES = 256 * 2**20
_CHUNK_BYTES_ON_A_CPU = 32 * 2**20
# Places that a chunk may have however large the vocabulary: with fewer, a product mostly reads
# the head.
_FEWEST = 256


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of a frozen head, with the gradient of the hidden states."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head, size: int
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _parts(len(hidden), size):
            with torch.set_grad_enabled(gradient is not None):
                chunk = hidden[part].detach().requires_grad_(gradient is not None)
                logits, are_kept = _logits(head, chunk)
            # The gradient may come to lie where the logits were: they are not asked any more.
            made_by = get_gradient_edge(logits) if gradient is not None else None
            loss, of_logits = _with_gradient(
                logits.detach(), targets[part], gradient is not None, not are_kept
            )
            total += loss
            if gradient is not None and made_by is not None:
                (gradient[part],) = torch.autograd.grad(made_by, chunk, of_logits)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad.to(gradient.dtype)), None, None, None


def chunked_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, size: int, is_trained: bool = False
) -> torch.Tensor:
    """Sum over N places of -log p(target), in nats, with gradients for the hidden states.

    Args:
        hidden: (N, H).
        targets: (N,), token ids.
        size: places at a time, at most.
        is_trained: whether the head has gradients too; its logits are then computed twice.
    """
    if not len(hidden):
        return hidden.sum() * 0.0
    if not is_trained:
        total: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, targets, head, size)
        return total
    total = hidden.new_zeros((), dtype=torch.float32)
    for part in _parts(len(hidden), size):
        total = total + checkpoint(
            lambda chunk, ids: _summed(head(chunk), ids),
            hidden[part],
            targets[part],
            use_reentrant=False,
        )
    return total


def _parts(count: int, most: int) -> list[slice]:
    """Of about the same length, as a short one costs little less: the head's weights are read."""
    number = math.ceil(count / most)
    ends = [count * n // number for n in range(number + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def _logits(head: Head, hidden: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(what the head makes of hidden states; whether its backward pass needs the result again)"""
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = head(hidden)
    storage = logits.untyped_storage()._cdata
    return logits, any(one.untyped_storage()._cdata == storage for one in kept)


def _with_gradient(
    logits: torch.Tensor, targets: torch.Tensor, is_needed: bool, in_place: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the sum of cross-entropies; its gradient: softmax, less 1 at the target)

    In the memory of the logits, or in one tensor more of their shape, where autograd takes four.
    """
    if in_place and logits.dtype == torch.float32:
        log_probabilities = torch.log_softmax(logits, dim=-1, out=logits)
    else:
        log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = F.nll_loss(log_probabilities, targets, reduction="sum")
    if not is_needed:
        return loss, None
    of_logits = log_probabilities.exp_()
    of_logits[torch.arange(len(targets), device=targets.device), targets] -= 1.0
    return loss, of_logits.to(logits.dtype)


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


class SupervisedForward:
    """A causal model's forward pass that, given labels, returns the loss and no logits."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.own_forward: Callable[..., Any] = model.forward
        backbone = model.base_model
        assert isinstance(backbone, nn.Module)
        self.backbone = backbone
        self.places = Places()
        """Those that the head will see, known before the backbone computes."""
        self._output_type: type[Any] = BaseModelOutputWithPast
        self._num_entries = 0
        self._is_head_trained = False

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **inputs: Any,
    ) -> Any:
        """As the model's own forward, but for the logits where there are `labels`, of shape (B, S).

        The loss is divided by `num_items_in_batch`, else by the number of supervised tokens.
        """
        if labels is None:
            return self.own_forward(input_ids=input_ids, **inputs)
        inputs = {**inputs, "use_cache": False}
        wanted = self.wanted(labels)
        of_batch = Wanted(wanted, labels.numel())
        with self.places.going_through(of_batch):
            output = self.backbone(input_ids=input_ids, **inputs)
        hidden, self._output_type = output.last_hidden_state, type(output)
        self.places.follow(hidden, of_batch)
        chosen = hidden.flatten(0, 1).index_select(0, wanted)
        if not self._num_entries and len(chosen):
            self._look_at_head(chosen)
        total = chunked_cross_entropy(
            chosen,
            labels.flatten()[wanted + 1],
            self.head,
            self.num_at_a_time(chosen.device.type),
            self._is_head_trained and torch.is_grad_enabled(),
        )
        count = len(chosen) if num_items_in_batch is None else num_items_in_batch
        if isinstance(count, torch.Tensor):
            count = count.to(total.device)
        loss: Any = total / count
        return CausalLMOutputWithPast(loss=loss)

    def wanted(self, labels: torch.Tensor) -> torch.Tensor:
        """(N,): which of the B · S places are followed by a supervised token of their row."""
        is_followed = torch.zeros_like(labels, dtype=torch.bool)
        is_followed[:, :-1] = labels[:, 1:] != IGNORE_INDEX
        return is_followed.flatten().nonzero().squeeze(1)

    def num_at_a_time(self, device: str) -> int:
        """Places whose logits are computed together."""
        return chunk_size(self._num_entries, device)

    def _look_at_head(self, hidden: torch.Tensor) -> None:
        with torch.enable_grad():
            logits = self.head(hidden[:1].detach())
        self._num_entries, self._is_head_trained = logits.shape[-1], logits.requires_grad

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model makes of hidden states (N, H): logits (N, V), by its own code, with
        whatever it scales or caps them by.
        """
        given = self._output_type(last_hidden_state=hidden[None])
        place = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        with ExitStack() as stack:
            stack.enter_context(keeping_positions())
            for one in (self.backbone, getattr(self.backbone, "decoder", None)):
                if isinstance(one, nn.Module):  # OPT's own forward passes over its backbone
                    stack.enter_context(replaced_forward(one, lambda *_, **__: given))
            logits: torch.Tensor = self.own_forward(input_ids=place, use_cache=False).logits
        return logits.squeeze(0)  # whose gradient is no copy, as that of logits[0] would be


def chunk_size(num_entries: int, device: str) -> int:
    """Places whose logits are computed at a time, at most."""
    return chunk_bytes(num_entries, device) // (4 * max(num_entries, 1))


def chunk_bytes(num_entries: int, device: str) -> int:
    """Of the logits of one chunk, in float32, at most."""
    usual = _CHUNK_BYTES_ON_A_CPU if device == "cpu" else _CHUNK_BYTES
    return max(usual, 4 * _FEWEST * num_entries)


@contextmanager
def supervised_only(
    model: PreTrainedModel, make: Callable[[PreTrainedModel], SupervisedForward] = SupervisedForward
) -> Iterator[None]:
    """The model computes no logits beside labels, while the context lasts."""
    with replaced_forward(model, make(model)):
        yield
