"""A model that no process holds whole (FSDP2): what is saved is gathered, what is put back shared
out again.

Every function here that gathers is called by all processes. A model that is not sharded goes
through unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(one, DTensor) for one in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, of which every process may hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_trainables(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The trainable weights, whole, by their names; None where the model holds them whole.

    Under DeepSpeed ZeRO-3 a parameter is empty until it is gathered.
    """
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if any(isinstance(one, DTensor) for one in named.values()):
        return {name: whole(one).detach() for name, one in named.items()}
    if all(one.numel() for one in named.values()):
        return None
    from deepspeed.zero import GatheredParameters

    with GatheredParameters(list(named.values())):
        return {name: one.detach().clone() for name, one in named.items()}


def whole_in(state: Any) -> Any:
    """The same nested state with every tensor whole."""
    if isinstance(state, torch.Tensor):
        return whole(state)
    if isinstance(state, dict):
        return {key: whole_in(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole_in(one) for one in state]
    return state


def shared_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, shared out as `like` is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    placed = tensor.to(device=like.device, dtype=like.dtype if tensor.is_floating_point() else None)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def adapter_shared_out(
    weights: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[str, torch.Tensor]:
    """An adapter's weights, under PEFT's names on the disk, each shared out as in the model."""
    held = {name.replace(".default.", "."): one for name, one in model.named_parameters()}
    return {
        name: shared_out(tensor, held[name]) if name in held else tensor
        for name, tensor in weights.items()
    }


def optimizer_shared_out(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """An optimizer's state dict with the tensors of each parameter shared out as that is."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    like = dict(zip(numbers, parameters, strict=True))
    shared = {
        number: {
            name: shared_out(one, like[number]) if isinstance(one, torch.Tensor) else one
            for name, one in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": shared}


def bytes_here(model: nn.Module) -> int:
    """Of all parameters, as this process holds them."""
    return sum(
        one.to_local().nbytes if isinstance(one, DTensor) else one.nbytes
        for one in model.parameters()
    )
