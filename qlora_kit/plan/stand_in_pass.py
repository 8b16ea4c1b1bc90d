"""What training has around a pass, where tensors have no numbers: its loss, its mode, and where
gradients and what is kept are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qlora_kit.memory.live import GRADIENTS, LiveTensors
from qlora_kit.train.supervised_loss import SupervisedForward


class ImaginedForward(SupervisedForward):
    """As many places as there are to be, since labels without numbers do not say which."""

    def __init__(self, model: Any, device: str, num_supervised: int):
        super().__init__(model)
        self.device = device
        self.num_supervised = num_supervised

    def num_at_a_time(self, device: str) -> int:
        return super().num_at_a_time(self.device)

    def wanted(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(min(self.num_supervised, labels[:, 1:].numel()), dtype=torch.long)


def begin_training(model: torch.nn.Module) -> None:
    """As `model.train()`; but what may leave out whole layers by lot (`layerdrop`, of OPT and its
    like) leaves out none: a lot without a number cannot be drawn, and none needs most.
    """
    model.train()
    for module in model.modules():
        if hasattr(module, "layerdrop"):
            module.training = False


@contextmanager
def known_gradients(trained: Sequence[torch.Tensor], live: LiveTensors) -> Iterator[None]:
    """Counted as such from the moment when they are complete."""

    def note(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            live.hold([parameter.grad], GRADIENTS)

    handles = [one.register_post_accumulate_grad_hook(note) for one in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def kept_elsewhere(wanted: bool) -> Iterator[None]:
    """What autograd saves takes no memory until it is asked for."""
    if not wanted:
        yield
        return

    def away(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
        return tensor.shape, tensor.dtype

    def back(form: tuple[torch.Size, torch.dtype]) -> torch.Tensor:
        shape, dtype = form
        return torch.empty(shape, dtype=dtype)

    with torch.autograd.graph.saved_tensors_hooks(away, back):
        yield
