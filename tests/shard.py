"""One of two processes that share out a tiny 4-bit model; started by test_sharded.py.

Trains it sharded, and beside that whole, on the same batches; saves it and puts it back.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.optim.lr_scheduler import ConstantLR

from qlora_kit.checkpoint.checkpoints import publish_checkpoint
from qlora_kit.environment import probe_hardware, settle_upstream
from qlora_kit.model.adapter import Adapted, attach_adapter
from qlora_kit.model.base import Base, load_base, prepare_for_training
from qlora_kit.model.saved import adapter_files, load_adapter
from qlora_kit.recipe import LoraSpec, ModelSpec, QuantizationSpec
from qlora_kit.train.sharded import bytes_here
from qlora_kit.train.snapshot import (
    Moving,
    Progress,
    difference,
    read_snapshot,
    snapshot,
    take,
)

SHAPE = {"items_per_update": 4, "items_per_process": 2, "num_updates": 3, "num_processes": 2}


def build(
    model: str, quantization: QuantizationSpec, sharded: bool
) -> tuple[Base, Adapted, Moving]:
    base = load_base(
        ModelSpec(name_or_path=model), quantization, torch.float32, "test", probe_hardware()
    )
    prepare_for_training(base.model, upcast_norms=False)
    adapted = attach_adapter(base, LoraSpec(r=4, alpha=8, dropout=0.0), seed=1)
    files = adapter_files(adapted.model, base, quantization, "0" * 64)
    if sharded:
        for layer in base.model.model.layers:
            fully_shard(layer)
        fully_shard(adapted.model)
    optimizer = AdamW([one for one in adapted.model.parameters() if one.requires_grad], lr=1e-2)
    return base, adapted, Moving(adapted.model, optimizer, ConstantLR(optimizer), None, files)


def step(moving: Moving, ids: torch.Tensor) -> float:
    loss = moving.model(input_ids=ids, labels=ids).loss
    loss.backward()
    moving.optimizer.step()
    moving.optimizer.zero_grad()
    return float(loss.detach())


def main(model: str, storage: str, folder: Path) -> None:
    settle_upstream()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    quantization = QuantizationSpec(quant_storage=storage)
    _, _, shared = build(model, quantization, sharded=True)
    _, _, alone = build(model, quantization, sharded=False)
    draws = torch.Generator().manual_seed(3)
    batches = [torch.randint(3, 290, (4, 12), generator=draws) for _ in range(4)]

    def both(ids: torch.Tensor) -> tuple[float, float]:
        """The mean of the halves, and the loss of the whole batch."""
        half = torch.tensor(step(shared, ids.chunk(2)[rank]))
        dist.all_reduce(half)
        return float(half) / 2, step(alone, ids)

    losses = [both(ids) for ids in batches[:3]]
    taken = take(shared)
    if rank == 0:
        publish_checkpoint(folder, snapshot(taken, Progress(3), SHAPE, [{}, {}]).write)
    dist.barrier()
    _, _, again = build(model, quantization, sharded=True)
    read_snapshot(folder, again)
    is_same = difference(again.weights(), taken.weights) is None
    reloaded = None
    if rank == 0:
        fresh = load_base(
            ModelSpec(name_or_path=model), quantization, torch.float32, "test", probe_hardware()
        )
        whole, _ = load_adapter(fresh, quantization, folder)
        with torch.no_grad():
            reloaded = [
                float(one(input_ids=batches[3], labels=batches[3]).loss)
                for one in (whole, alone.model)
            ]
    next_losses = [
        [step(one, ids.chunk(2)[rank]) for ids in batches[2:]] for one in (shared, again)
    ]
    told = json.dumps(
        {
            "losses": losses,
            "bytes": [bytes_here(shared.model), bytes_here(alone.model)],
            "is_same": is_same,
            "reloaded": reloaded,
            "next_losses": next_losses,
        }
    )
    os.write(1, f"{told}\n".encode())  # in one piece, beside the other process
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
