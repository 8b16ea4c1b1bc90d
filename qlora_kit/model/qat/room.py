"""Whether the weights of a model can be trained themselves in the memory of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_kit.errors import HardwareError
from qlora_kit.model.qat.attach import trained_in_full
from qlora_kit.model.qat.aware import Aware

if TYPE_CHECKING:
    from qlora_kit.environment import Hardware
    from qlora_kit.model.skeleton import Skeleton

STATE_BYTES: dict[str, float] = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8,
    "ademamix": 12,
    "ademamix_8bit": 3,
    "paged_ademamix_8bit": 3,
    "paged_ademamix_32bit": 12,
    "lion_8bit": 1,
    "lion_32bit": 4,
    "paged_lion_8bit": 1,
    "paged_lion_32bit": 4,
    "rmsprop": 4,
    "rmsprop_bnb_8bit": 1,
    "adagrad": 4,
    "adafactor": 0,
    "sgd": 0,
}
"""What an optimizer keeps for a weight that it trains, nearly; adafactor a row and a column."""

_CODE_BYTES = {"nf4": 0.5, "int8": 1.0, "int4-group": 1.0}
_GIB = 1024**3


@dataclass(frozen=True)
class Allowance:
    """What one process may take."""

    num_bytes: float
    said_by: str
    """The sentence that the figure ends: who has or allows it."""
    device: str


def room_for_each(
    hardware: Hardware,
    max_memory_mib: int | None,
    *,
    container_bytes: int | None,
    num_processes_here: int,
) -> Allowance:
    """The narrowest of what there is. A GPU is one process's own, while all processes of a machine
    hold their weights in its one memory, of which a container may have less.
    """
    device = hardware.device
    each = f"for each of {num_processes_here} processes " if num_processes_here > 1 else ""
    if hardware.device_memory_bytes is not None:
        rooms = [Allowance(hardware.device_memory_bytes, f"{hardware.device_name} has", device)]
    else:
        there = hardware.host_memory_bytes / num_processes_here
        rooms = [Allowance(there, f"{hardware.device_name} has {each}".rstrip(), device)]
        if container_bytes is not None:
            allowed = container_bytes / num_processes_here
            rooms.append(Allowance(allowed, f"this container allows {each}".rstrip(), device))
    if max_memory_mib is not None:
        rooms.append(Allowance(max_memory_mib * 1024**2, "train.max_memory_mib allows", device))
    return min(rooms, key=lambda room: room.num_bytes)


def require_memory(
    skeleton: Skeleton, aware: Aware | None, optim: str, compute_dtype: torch.dtype, room: Allowance
) -> None:
    """Refuse to train all weights where their state alone is more than the memory.

    Activations and logits come on top of it; whether those fit is found out by trying.

    Raises:
        HardwareError: says what it takes and what there is.
    """
    if aware is None or aware.spec.train != "full":
        return
    each = _bytes_of_a_weight(aware, optim, compute_dtype, room.device)
    trained = sum(
        parameter.numel()
        for name in trained_in_full(skeleton)
        for parameter in skeleton.model.get_submodule(name).parameters()
    )
    others = sum(one.numel() for one in skeleton.model.parameters()) - trained
    needed = trained * sum(each.values()) + others * compute_dtype.itemsize
    if needed <= room.num_bytes:
        return
    parts = ", ".join(f"{size:g} {what}" for what, size in each.items() if size)
    raise HardwareError(
        f"quantization_aware.train: full takes at least {needed / _GIB:,.1f} GiB: "
        f"{trained / 1e6:,.1f} M weights are trained, of {sum(each.values()):g} bytes each "
        f"({parts}), beside {others / 1e6:,.1f} M that are not; {room.said_by} "
        f"{room.num_bytes / _GIB:,.1f} GiB. "
        "Train an adapter (quantization_aware.train: adapter), take a smaller model, or an "
        f"optimizer with less state (train.optim, now {optim})."
    )


def _bytes_of_a_weight(
    aware: Aware, optim: str, compute_dtype: torch.dtype, device: str
) -> dict[str, float]:
    """By what they are for."""
    is_elsewhere = optim.startswith("paged_") and device != "cpu"  # may go to the host's memory
    return {
        "the weight": 4,
        "its gradient": 4,
        f"the state of {optim}": 0 if is_elsewhere else STATE_BYTES[optim],
        "the base's own": compute_dtype.itemsize,
        "its rounding": aware.merged_dtype.itemsize,
        "its code": _CODE_BYTES[aware.spec.method],
    }
