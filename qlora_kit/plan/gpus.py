"""GPUs that can be planned for without having one."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_kit.environment import Hardware, available_cpus
from qlora_kit.errors import HardwareError

_GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """As its maker describes it."""

    memory_gib: int
    has_bf16: bool = True
    """Whether it computes in bfloat16, as all since compute capability 8.0 do."""


GPUS = {
    "T4": Gpu(16, has_bf16=False),
    "V100 16GB": Gpu(16, has_bf16=False),
    "V100": Gpu(32, has_bf16=False),
    "RTX 2080 Ti": Gpu(11, has_bf16=False),
    "RTX 3060": Gpu(12),
    "RTX 3080": Gpu(10),
    "RTX 3090": Gpu(24),
    "RTX 4060 Ti": Gpu(16),
    "RTX 4070": Gpu(12),
    "RTX 4080": Gpu(16),
    "RTX 4090": Gpu(24),
    "RTX 5080": Gpu(16),
    "RTX 5090": Gpu(32),
    "RTX A6000": Gpu(48),
    "A10": Gpu(24),
    "A40": Gpu(48),
    "L4": Gpu(24),
    "L40S": Gpu(48),
    "A100": Gpu(40),
    "A100 80GB": Gpu(80),
    "H100": Gpu(80),
    "H200": Gpu(141),
    "B200": Gpu(180),
}
"""By the name that people use; those with several sizes have one entry each."""


def known_gpu(name: str, count: int = 1) -> Hardware:
    """A machine with so many of them.

    Raises:
        HardwareError: the name is not known; lists those that are.
    """
    names = {plain_name(one): one for one in GPUS}
    found = names.get(plain_name(name))
    if found is None:
        raise HardwareError(f"there is no GPU '{name}' in the kit; it knows {', '.join(GPUS)}.")
    gpu = GPUS[found]
    return Hardware(
        device="cuda",
        device_name=found,
        num_devices=count,
        device_memory_bytes=gpu.memory_gib * _GIB,
        num_cpus=available_cpus(),
        host_memory_bytes=0,
        native_bf16=gpu.has_bf16,
        native_fp16=True,
        native_tf32=gpu.has_bf16,
        reason=f"{found} {'computes' if gpu.has_bf16 else 'does not compute'} in bfloat16",
    )


def plain_name(name: str) -> str:
    """Without capitals, spaces and the maker's words: the same for what people and drivers say."""
    words = name.lower().replace("-", " ").replace("gb", "").split()
    return "".join(word for word in words if word not in ("nvidia", "geforce", "tesla"))
