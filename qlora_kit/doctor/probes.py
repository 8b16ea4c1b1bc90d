"""What is measured. Every function stands alone and may fail in any way: see `apart`.

torch and bitsandbytes are imported inside, because whether they can be is the question.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from qlora_kit.environment import Hardware, probe_hardware, resolve_compute_dtype

if TYPE_CHECKING:
    import torch

_HUB_SECONDS = 3.0


@dataclass(frozen=True)
class TorchBuild:
    """What torch was built for, and how many threads it computes with."""

    version: str
    gpu: str | None
    """What it was built against, such as `CUDA 13.0`; None for a build for CPUs only."""
    has_apple_gpu: bool
    num_threads: int


@dataclass(frozen=True)
class Memory:
    """Of the device that trains: the GPU's, or the host's within the container's limit."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class FourBit:
    """How far a 4-bit layer is from what it should be; relative, in the Frobenius norm.

    `weight_error`: dequantized weights against those given. `forward_error` and
    `backward_error`: the layer's products against those with its dequantized weights.
    """

    weight_error: float
    forward_error: float
    backward_error: float


def torch_build() -> TorchBuild:
    """What the installed torch was built for."""
    import torch

    kinds = (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip))
    return TorchBuild(
        version=torch.__version__,
        gpu=next((f"{name} {version}" for name, version in kinds if version), None),
        has_apple_gpu=torch.backends.mps.is_available(),
        num_threads=torch.get_num_threads(),
    )


def hardware() -> Hardware:
    return probe_hardware()


def memory() -> Memory:
    """Of the device that trains; of a CPU what the container allows."""
    import psutil
    import torch

    from qlora_kit.train.memory import cgroup_limit_bytes

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(0)
        return Memory(total, free)
    host, limit = psutil.virtual_memory(), cgroup_limit_bytes()
    total = host.total if limit is None else min(host.total, limit)
    return Memory(total, min(host.available, total))


def four_bit() -> FourBit:
    """A small layer as the default recipe has it: NF4, double quantization, auto compute dtype."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    device, dtype = _device_and_dtype()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator).to(dtype)
    inputs = torch.randn(8, 512, generator=generator).to(device, dtype).requires_grad_()
    gradient = torch.randn(8, 256, generator=generator).to(device, dtype)
    layer = Linear4bit(
        512, 256, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
    )
    layer.load_state_dict({"weight": weight})
    layer = layer.to(device)
    stored = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    outputs = layer(inputs)
    outputs.backward(gradient)
    assert inputs.grad is not None
    return FourBit(
        weight_error=_relative(stored, weight.to(device)),
        forward_error=_relative(outputs, inputs @ stored.T),
        backward_error=_relative(inputs.grad, gradient @ stored),
    )


def optimizer_error() -> float:
    """How far five steps of paged AdamW in 8 bits lead from those of torch's own AdamW.

    Relative to the way that AdamW went.
    """
    import torch
    from bitsandbytes.optim import PagedAdamW8bit

    device, _ = _device_and_dtype()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 256, generator=generator)
    gradients = [torch.randn(64, 256, generator=generator).to(device) for _ in range(5)]
    ends = []
    for optimizer in (torch.optim.AdamW, PagedAdamW8bit):
        parameter = torch.nn.Parameter(start.clone().to(device))
        stepper = optimizer([parameter], lr=1e-3, weight_decay=0.0)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            stepper.step()
        ends.append(parameter.detach() - start.to(device))
    return _relative(ends[1], ends[0])


def operations_per_second() -> float:
    """Floating-point operations per second of a square product in the auto compute dtype."""
    import torch

    device, dtype = _device_and_dtype()
    size = 1024 if device == "cpu" else 8192
    left = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        float((left @ left)[0, 0])  # reading a number waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def hub_answer(patience_seconds: float = _HUB_SECONDS) -> str:
    """One request to the hub; empty where it answers in that time, else what happened."""
    import httpx
    from huggingface_hub import constants

    answers: list[str] = []

    def ask() -> None:
        try:
            status = httpx.head(constants.ENDPOINT, timeout=patience_seconds).status_code
        except httpx.HTTPError as error:
            answers.append(str(error) or type(error).__name__)
        else:
            answers.append("" if status < 400 else f"it answers with status {status}")

    # A name server that does not answer holds a request up far beyond its own timeout.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience_seconds + 1)
    return answers[0] if answers else f"no answer in {patience_seconds:g} s"


def _device_and_dtype() -> tuple[str, torch.dtype]:
    import torch

    machine = probe_hardware()
    dtype: torch.dtype = getattr(torch, resolve_compute_dtype("auto", machine)[0])
    return machine.device, dtype


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖."""
    difference = got.detach().double() - wanted.detach().double()
    return float(difference.norm() / wanted.detach().double().norm())
