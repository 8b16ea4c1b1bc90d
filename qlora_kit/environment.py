"""What this machine can do. The only module that reads environment variables.

Nothing here imports torch at the top: `qlora-kit check` and `--help` must stay instant.
Functions that probe the hardware import it when called.
"""

from __future__ import annotations

import logging
import os
import platform
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.errors import HardwareError, LaunchError

if TYPE_CHECKING:
    import torch

# How many times as long as the fp32 one a backward product in bf16 may take: native where it is no
# slower (AMX: 0.2 to 0.5), usable where it is not emulated. AVX512-BF16 without AMX took 0.5 on one
# machine and 1.7 to 2.5 on another, emulated bf16 20 to 100: what follows must not depend on load.
_NATIVE_BF16_MAX_SLOWDOWN = 1.0
_USABLE_BF16_MAX_SLOWDOWN = 8.0
_NUM_TIMINGS = 25
_CPU_BFLOAT16 = "QLORA_KIT_CPU_BFLOAT16"
_ONEDNN_SHAPES = "64"
_QUANTIZED_GIB = 30
_TUNABLES = "GLIBC_TUNABLES"
# What processes need in order to meet, and what MPI tells them of their number.
_MEETING = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Below compute capability 7.0 only these multiply float16 faster than float32.
_OLD_GPUS_WITH_FP16 = ((5, 3), (6, 0), (6, 2))


def cache_dir() -> Path:
    """Where downloaded and converted models are kept; `QLORA_KIT_CACHE` moves it."""
    moved = os.environ.get("QLORA_KIT_CACHE")
    if moved:
        return Path(moved).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("qlora_kit"))


def quantized_cache_bytes() -> int:
    """How much of the cache quantized bases may fill; `QLORA_KIT_QUANTIZED_GIB` says it, 0 for
    none at all.

    Raises:
        HardwareError: it says something else than a number of GiB.
    """
    text = os.environ.get("QLORA_KIT_QUANTIZED_GIB") or str(_QUANTIZED_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = float("nan")
    if not 0 <= gib < float("inf"):
        raise HardwareError(
            f"QLORA_KIT_QUANTIZED_GIB is {text!r}; set it to the GiB that quantized bases may fill "
            "in the cache, 0 for none."
        )
    return int(gib * 1024**3)


def llama_cpp_checkout() -> Path | None:
    """A checkout of llama.cpp that every verb and recipe takes; `QLORA_KIT_LLAMA_CPP` names it."""
    named = os.environ.get("QLORA_KIT_LLAMA_CPP")
    return Path(named).expanduser() if named else None


def hub_is_offline() -> bool:
    """Whether the user forbids network calls to the model hub (HF_HUB_OFFLINE and kin)."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "TRUE", "YES", "ON"} for name in names)


def launched() -> tuple[int, int, int, int]:
    """Rank, rank on this machine, number of processes, and number on this machine.

    As accelerate, torchrun and DeepSpeed tell them; alone where none did.
    """
    count = int(os.environ.get("WORLD_SIZE") or "1")
    rank = int(os.environ.get("RANK") or "0")
    local_rank = int(os.environ.get("LOCAL_RANK") or "0")
    return rank, local_rank, count, int(os.environ.get("LOCAL_WORLD_SIZE") or str(count))


def require_whole_launch() -> None:
    """Raises LaunchError where several processes were started and are not told what they need to
    meet, or by MPI, whose processes accelerate would join on a CPU and pass over on a GPU.
    """
    count = launched()[2]
    missing = [name for name in _MEETING if not os.environ.get(name)]
    if count > 1 and missing:
        raise LaunchError(
            f"WORLD_SIZE is {count}, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; launch with torchrun, which sets "
            "them, or set them for every process, or unset WORLD_SIZE."
        )
    by_mpi = max(int(os.environ.get(name) or "1") for name in _MPI)
    if by_mpi > count:
        raise LaunchError(
            f"MPI started {by_mpi} processes, which do not know of each other here; launch with "
            "torchrun --nproc-per-node, or set WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and "
            "MASTER_PORT for every process."
        )


def require_one_process(verb: str) -> None:
    """Raises LaunchError where a launcher started several processes of a verb for one."""
    count = launched()[2]
    if count > 1:
        fault = LaunchError(
            f"{count} processes of {verb} were launched, and only train runs in several; launch "
            f"one (qlora-kit {verb} …)."
        )
        fault.is_told_elsewhere = launched()[0] > 0
        raise fault


@dataclass(frozen=True)
class LauncherSettings:
    """What `accelerate launch` hands on of its configuration; empty texts where it says nothing."""

    mixed_precision: str = ""
    dynamo_backend: str = ""
    fsdp: bool = False
    fsdp_version: str = ""
    fsdp_ram_efficient: bool = False
    fsdp_activation_checkpointing: bool = False
    deepspeed: bool = False
    zero_stage: str = ""
    accumulation: str = ""
    clipping: str = ""
    """Norm that DeepSpeed clips gradients to."""
    deepspeed_file: str = ""
    """A configuration of DeepSpeed's own."""
    megatron: bool = False
    parallel: bool = False
    left_alone: bool = False
    """Whether several processes were asked for, of which accelerate starts one: it does so on a
    CPU, beside a single GPU, and with distributed_type: "NO".
    """

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds the whole model."""
        return self.fsdp or (self.deepspeed and self.zero_stage == "3")


def launcher_settings() -> LauncherSettings:
    """As accelerate's launcher tells them."""

    def is_on(name: str) -> bool:
        return os.environ.get(name, "").lower() in {"1", "true", "yes", "on"}

    def text(name: str) -> str:
        return os.environ.get(name, "")

    return LauncherSettings(
        mixed_precision=text("ACCELERATE_MIXED_PRECISION").lower(),
        dynamo_backend=text("ACCELERATE_DYNAMO_BACKEND").upper(),
        fsdp=is_on("ACCELERATE_USE_FSDP"),
        fsdp_version=text("FSDP_VERSION"),
        fsdp_ram_efficient=is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"),
        fsdp_activation_checkpointing=is_on("FSDP_ACTIVATION_CHECKPOINTING"),
        deepspeed=is_on("ACCELERATE_USE_DEEPSPEED"),
        zero_stage=text("ACCELERATE_DEEPSPEED_ZERO_STAGE"),
        accumulation=text("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
        clipping=text("ACCELERATE_GRADIENT_CLIPPING"),
        deepspeed_file=text("ACCELERATE_DEEPSPEED_CONFIG_FILE"),
        megatron=is_on("ACCELERATE_USE_MEGATRON_LM"),
        parallel=is_on("ACCELERATE_USE_PARALLELISM_CONFIG"),
        left_alone=bool(text("ACCELERATE_MIXED_PRECISION"))  # its launcher was at work
        and bool(text("MASTER_PORT"))
        and not text("WORLD_SIZE"),
    )


def thread_setting() -> str:
    """What the user set OMP_NUM_THREADS to; empty where they did not."""
    return os.environ.get("OMP_NUM_THREADS", "")


def tensorboard_folder(default: Path) -> Path:
    """Where curves are written: transformers' own setting goes first."""
    asked = os.environ.get("TENSORBOARD_LOGGING_DIR")
    return Path(asked).expanduser() if asked else default


def heap_settings() -> dict[str, str]:
    """What the GNU C library was told of its heap when this process began, by name."""
    parts = (part.partition("=") for part in os.environ.get(_TUNABLES, "").split(":"))
    return {name: value for name, _, value in parts if name}


def with_heap_settings(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process, with these settings beside those that there are."""
    values = {**heap_settings(), **settings}.items()
    return {**os.environ, _TUNABLES: ":".join(f"{name}={value}" for name, value in values)}


def settle_upstream() -> None:
    """Before those libraries are imported: no telemetry, no progress bars, bounded caches.

    bitsandbytes logs one line per 8-bit product where it computes in another dtype than float16,
    and on a CPU with AVX512-BF16 that a kernel could not be fetched which is never used here; torch
    logs that torchao registers what it need not.
    Upstream deprecations are for us to heed, not for a user: in the tests they are errors.
    """
    warnings.simplefilter("ignore", FutureWarning)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    # llmcompressor shows a bar for each block of a model, and cannot be told not to. It logs on
    # stdout from its import on, and compressed_tensors by loguru's own sink on stderr.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "CRITICAL")
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # oneDNN, by which a CPU multiplies in bfloat16, keeps about a MiB for every shape of a product,
    # of 1,024 shapes twice; rows of all lengths have as many.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _ONEDNN_SHAPES)
    os.environ.setdefault("LRU_CACHE_CAPACITY", _ONEDNN_SHAPES)
    for name in ("bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Hardware:
    """One machine as training sees it. Sizes in bytes."""

    device: str
    device_name: str
    num_devices: int
    device_memory_bytes: int | None
    num_cpus: int
    host_memory_bytes: int
    native_bf16: bool
    native_fp16: bool
    native_tf32: bool
    reason: str
    """Why `native_bf16` is what it is: the evidence, in words."""
    slow_bf16: bool = False
    """bf16 is slower than fp32, and yet not emulated: taken where asked for, not by `auto`."""

    @property
    def has_bf16(self) -> bool:
        return self.native_bf16 or self.slow_bf16


@lru_cache(maxsize=1)
def probe_hardware() -> Hardware:
    """Ask the machine, not its name: a CPU's bf16 is timed, a GPU's asked without emulation."""
    import psutil
    import torch

    memory = psutil.virtual_memory().total
    cpus = available_cpus()
    if torch.cuda.is_available():
        native = bool(torch.cuda.is_bf16_supported(including_emulation=False))
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        is_nvidia = torch.version.hip is None
        return Hardware(
            device="cuda",
            device_name=properties.name,
            num_devices=torch.cuda.device_count(),
            device_memory_bytes=properties.total_memory,
            num_cpus=cpus,
            host_memory_bytes=memory,
            native_bf16=native,
            native_fp16=not is_nvidia or capability >= (7, 0) or capability in _OLD_GPUS_WITH_FP16,
            native_tf32=is_nvidia and capability >= (8, 0),
            reason=f"{properties.name} (compute capability {properties.major}.{properties.minor}) "
            + ("has bfloat16 units" if native else "has no bfloat16 units"),
        )
    native, usable, reason = _probe_cpu_bf16()
    return Hardware(
        device="cpu",
        device_name=cpu_name(),
        num_devices=0,
        device_memory_bytes=None,
        num_cpus=cpus,
        host_memory_bytes=memory,
        native_bf16=native,
        native_fp16=False,
        native_tf32=False,
        reason=reason,
        slow_bf16=usable and not native,
    )


def _probe_cpu_bf16() -> tuple[bool, bool, str]:
    """Whether bf16 is native, whether it is usable, and why: one backward-shaped product (g @ W) is
    timed in both dtypes, and emulated bf16 gives itself away. `QLORA_KIT_CPU_BFLOAT16=off` in the
    environment leaves it out of use.
    """
    import torch

    if _is_switched_off():
        return False, False, f"{_CPU_BFLOAT16} is off"
    if not _onednn_has_bf16():
        return False, False, "this CPU has no native bfloat16 (oneDNN reports no support)"
    ratio = _product_seconds(torch.bfloat16) / _product_seconds(torch.float32)
    native, usable = ratio <= _NATIVE_BF16_MAX_SLOWDOWN, ratio <= _USABLE_BF16_MAX_SLOWDOWN
    return native, usable, f"a bfloat16 product takes {ratio:.1f} times a float32 one on this CPU"


def require_known_switches() -> None:
    """Raises HardwareError where the environment says neither on nor off of what it may switch."""
    said = os.environ.get(_CPU_BFLOAT16, "on")
    if said.lower() not in ("on", "off"):
        raise HardwareError(f"{_CPU_BFLOAT16} is {said!r}; set it to on or off.")


def _is_switched_off() -> bool:
    require_known_switches()
    return os.environ.get(_CPU_BFLOAT16, "on").lower() == "off"


def _onednn_has_bf16() -> bool:
    import torch

    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product_seconds(dtype: torch.dtype) -> float:
    """The best of several, which other work on the machine can only lengthen."""
    import torch

    gradient = torch.ones(64, 512, dtype=dtype)
    weight = torch.ones(512, 512, dtype=dtype)
    gradient @ weight
    best = float("inf")
    for _ in range(_NUM_TIMINGS):
        start = time.perf_counter()
        gradient @ weight
        best = min(best, time.perf_counter() - start)
    return best


def resolve_compute_dtype(asked: str, hardware: Hardware) -> tuple[str, str]:
    """The dtype to compute in, and why, for `quantization.compute_dtype`.

    Raises:
        HardwareError: `asked` names a dtype that this machine can only emulate.
    """
    if asked == "float32":
        return "float32", "asked for"
    if asked == "bfloat16":
        if not hardware.has_bf16:
            raise HardwareError(
                f"quantization.compute_dtype is bfloat16, but {hardware.reason}; "
                "use auto or float32"
                + (" or float16" if hardware.native_fp16 else "")
                + ("." if _is_switched_off() else " (emulated, it trains about 70 times slower).")
            )
        return "bfloat16", "asked for"
    if asked == "float16":
        if not hardware.native_fp16:
            raise HardwareError(
                "quantization.compute_dtype is float16, but this machine trains on "
                f"{hardware.device_name}, where float16 is emulated; use auto or float32."
            )
        return "float16", "asked for"
    if hardware.native_bf16:
        return "bfloat16", hardware.reason
    if hardware.native_fp16:
        return "float16", f"{hardware.reason}; float16 with a gradient scaler instead"
    return "float32", hardware.reason


def available_cpus() -> int:
    """Cores this process may use, which under a container or Slurm is fewer than exist."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """As the system has it, which may be of many models."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
