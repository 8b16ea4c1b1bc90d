"""What it takes to train all weights, held against what optimizers really keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Trainer, TrainingArguments

from qlora_kit.environment import probe_hardware
from qlora_kit.errors import HardwareError
from qlora_kit.model.qat.aware import Aware
from qlora_kit.model.qat.room import STATE_BYTES, require_memory, room_for_each
from qlora_kit.model.skeleton import build_skeleton
from qlora_kit.recipe import QuantizationAwareSpec
from qlora_kit.recipe.train import Optimizer

GIB = 1024**3
# 201,326,592 weights of linear layers, and 131,086,336 others.
CONFIG = LlamaConfig(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=3,
    tie_word_embeddings=False,
)


def aware(**values: Any) -> Aware:
    return Aware(
        QuantizationAwareSpec(**{"method": "nf4", "train": "full", **values}), torch.bfloat16
    )


def check(memory: float, seen: Aware | None, **changes: Any) -> None:
    values: dict[str, Any] = {
        "optim": "adamw_torch",
        "compute_dtype": torch.bfloat16,
        "hardware": replace(
            probe_hardware(),
            device="cpu",
            device_name="a machine",
            device_memory_bytes=None,
            host_memory_bytes=int(memory),
        ),
        "max_memory_mib": None,
        "container_bytes": None,
        "num_processes_here": 1,
        **changes,
    }
    optim, compute_dtype = values.pop("optim"), values.pop("compute_dtype")
    room = room_for_each(values.pop("hardware"), values.pop("max_memory_mib"), **values)
    require_memory(build_skeleton(CONFIG), seen, optim, compute_dtype, room)


def test_it_fits_or_is_refused_with_the_figures() -> None:
    # 4 + 4 + 8 + 2 + 2 + 0.5 bytes for a trained weight, 2 for another.
    needed = 201_326_592 * 20.5 + 131_086_336 * 2
    check(needed + 1, aware())
    with pytest.raises(HardwareError) as refused:
        check(needed - 1, aware())
    for words in (
        "train: full takes at least 4.1 GiB",
        "201.3 M weights are trained, of 20.5 bytes each",
        "8 the state of adamw_torch",
        "131.1 M that are not",
        "a machine has 4.1 GiB",
        "train: adapter",
    ):
        assert words in str(refused.value)


def test_a_lighter_optimizer_fits() -> None:
    check(4 * GIB, aware(), optim="paged_adamw_8bit")
    with pytest.raises(HardwareError):
        check(4 * GIB, aware())


def test_on_a_gpu_paged_state_need_not_fit() -> None:
    gpu = replace(
        probe_hardware(),
        device="cuda",
        device_memory_bytes=int(201_326_592 * 12.5 + 131_086_336 * 2),
        host_memory_bytes=GIB,
    )
    check(0, aware(), hardware=gpu, optim="paged_adamw_32bit")
    with pytest.raises(HardwareError, match="adamw_torch"):
        check(0, aware(), hardware=gpu)


def test_a_limit_of_the_recipe_s_own() -> None:
    with pytest.raises(HardwareError, match=r"train.max_memory_mib allows 2\.0 GiB"):
        check(64 * GIB, aware(), max_memory_mib=2048)


def test_a_container_has_less_than_its_machine() -> None:
    with pytest.raises(HardwareError, match=r"this container allows 2\.0 GiB"):
        check(64 * GIB, aware(), container_bytes=2 * GIB)
    check(64 * GIB, aware(), container_bytes=32 * GIB)
    with pytest.raises(HardwareError, match=r"a machine has 2\.0 GiB"):
        check(2 * GIB, aware(), container_bytes=32 * GIB)


def test_every_process_of_a_machine_holds_its_own_copy() -> None:
    check(16 * GIB, aware())
    with pytest.raises(HardwareError, match=r"a machine has for each of 4 processes 4\.0 GiB"):
        check(16 * GIB, aware(), num_processes_here=4)
    with pytest.raises(HardwareError, match=r"container allows for each of 2 processes 4\.0 GiB"):
        check(64 * GIB, aware(), num_processes_here=2, container_bytes=8 * GIB)


def test_of_a_gpu_each_process_has_its_own() -> None:
    gpu = replace(probe_hardware(), device="cuda", device_memory_bytes=8 * GIB)
    check(0, aware(), hardware=gpu, num_processes_here=8, container_bytes=GIB)


def test_an_adapter_is_not_asked() -> None:
    check(1, aware(train="adapter"))
    check(1, None)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", sorted({*get_args(Optimizer)} - {"auto"}))
def test_what_optimizers_keep(optim: str, tmp_path: Any) -> None:
    """Of a matrix: the figure is never too high, so that nothing is refused that would fit."""
    layer = nn.Linear(256, 256, bias=False)
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True)
    optimizer = Trainer(model=layer, args=arguments).create_optimizer()
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    kept = sum(
        one.numel() * one.element_size()
        for state in optimizer.state.values()
        for one in state.values()
        if isinstance(one, torch.Tensor)
    )
    assert STATE_BYTES[optim] <= kept / layer.weight.numel() <= STATE_BYTES[optim] + 0.1
