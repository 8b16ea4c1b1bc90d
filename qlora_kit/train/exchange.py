"""The gradients of an update, averaged over the processes that share it.

DistributedDataParallel exchanges them while the last backward pass is under way, and a process
that runs out of memory there leaves the others waiting. So they are exchanged here instead, once
every process is known to have its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed
from torch import nn

_BUCKET_BYTES = 32 * 1024**2


def average_gradients(
    model: nn.Module, num_processes: int, gathered: Callable[[list[bool]], list[list[bool]]]
) -> None:
    """In place, called by every process. What has a gradient on some processes only counts as
    zero on the others.

    Args:
        gathered: gives what every process gives to it.
    """
    trained = [one for one in model.parameters() if one.requires_grad]
    having = gathered([one.grad is not None for one in trained])
    grads = []
    for parameter, *has in zip(trained, *having, strict=True):
        if any(has):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
    for bucket in _buckets(grads):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        torch.distributed.all_reduce(flat)
        flat /= num_processes
        parts = flat.split([grad.numel() for grad in bucket])
        for grad, part in zip(bucket, parts, strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(grads: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """In order, of one dtype each and of so many bytes that few messages are sent."""
    bucket: list[torch.Tensor] = []
    for grad in grads:
        full = sum(one.nbytes for one in bucket) + grad.nbytes > _BUCKET_BYTES
        if bucket and (full or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket
