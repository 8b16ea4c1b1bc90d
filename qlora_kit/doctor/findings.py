"""From what was measured to what it means for a recipe. Plain values in, plain words out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qlora_kit.doctor.apart import Outcome
from qlora_kit.doctor.probes import FourBit, Memory, TorchBuild
from qlora_kit.environment import Hardware, resolve_compute_dtype
from qlora_kit.errors import HardwareError
from qlora_kit.packages import Package
from qlora_kit.train.arguments import resolve_precision

Status = Literal["ok", "note", "missing", "broken"]

_GIB = 1024**3

# Bytes that training takes for each parameter of the base, for models of about 8 B parameters:
# nine tenths are NF4 with double quantization, one tenth (embeddings, head) stays in the compute
# dtype, and a LoRA of r 16 on every linear layer adds 0.5 % of float32 weights with gradients
# (8 bytes) and 8-bit optimizer states (2 bytes).
_QUANTIZED_SHARE = 0.9
_QUANTIZED_BITS = 4.127
_LORA_SHARE = 0.005
_LORA_BYTES = 10
# Set aside for the process itself, and as a share for activations at short lengths.
_RESERVED_BYTES = 2 * _GIB
_USABLE_SHARE = 0.8

# Operations for each parameter and token: forward, forward again for gradient checkpointing,
# and backward to the activations, 2 each; frozen weights have no gradient.
_OPERATIONS = 6

# NF4's error on normally distributed weights is 0.09 (bitsandbytes blocks of 64).
_MAX_WEIGHT_ERROR = 0.12
_MAX_PRODUCT_ERROR = 0.02
_MAX_OPTIMIZER_ERROR = 0.15
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    `status`: ok; note: it works, with a consequence worth knowing; missing: not there, and not
    needed by every run; broken: needed, and does not work. `figures` are what was measured.
    """

    name: str
    status: Status
    found: str
    means: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


def packages_finding(version: str, outcome: Outcome) -> Finding:
    """Python and the installed packages against the ranges that the kit supports."""
    if outcome.fault:
        return Finding("packages", "broken", outcome.fault, "install the kit again")
    package_ranges: tuple[Package, ...] = outcome.value
    wrong = [package for package in package_ranges if not package.fits]
    if wrong:
        found = "; ".join(
            f"{package.name} {package.installed or 'is not installed'}, needed {package.needed}"
            for package in wrong
        )
        return Finding("packages", "broken", found, "install the kit again, or these versions")
    if not package_ranges:
        found = f"Python {version}; the kit is not installed as a package, so no ranges are known"
        return Finding("packages", "note", found, "pip install the kit for its pinned versions")
    shown = ("torch", "transformers", "bitsandbytes", "peft", "accelerate")
    versions = ", ".join(
        f"{package.name} {package.installed} ({package.needed})"
        for package in package_ranges
        if package.name in shown
    )
    others = len(package_ranges) - len(shown)
    found = f"Python {version}, {versions}, and {others} more: all in the supported ranges"
    return Finding("packages", "ok", found)


def torch_finding(outcome: Outcome) -> Finding:
    """Whether torch can be imported, and what it was built for."""
    if outcome.fault:
        return Finding("torch", "broken", outcome.fault, "nothing but `check` works; reinstall it")
    build: TorchBuild = outcome.value
    return Finding("torch", "ok", f"{build.version}, built for {build.gpu or 'CPUs only'}")


def device_finding(machine: Hardware, build: TorchBuild) -> Finding:
    """The device that trains; where that is no GPU, why."""
    if machine.device == "cuda":
        more = f", {machine.num_devices} of them" if machine.num_devices > 1 else ""
        return Finding("device", "ok", f"{machine.device_name}{more}; {machine.num_cpus} cores")
    found = f"no CUDA: {machine.device_name}, {machine.num_cpus} cores"
    if build.has_apple_gpu:
        return Finding("device", "missing", found, "this Mac's GPU is not used; training is slow")
    has_driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
    if has_driver and build.gpu is None:
        means = "a GPU driver is here, but this torch is built for CPUs: install a CUDA build"
    elif has_driver:
        means = (
            f"a GPU driver is here, but torch finds no GPU: too old for {build.gpu}, or "
            "hidden by CUDA_VISIBLE_DEVICES"
        )
    else:
        means = "the same recipe trains on the CPU, slowly"
    return Finding("device", "missing", found, means)


def dtype_finding(machine: Hardware) -> Finding:
    """Native dtypes with the evidence, and what of a recipe is refused."""
    compute, _ = resolve_compute_dtype("auto", machine)
    refused = [f"train.precision: {asked}" for asked in _refused_precisions(machine)]
    if not machine.native_tf32:
        refused.append("train.tf32: true")
    means = f"compute_dtype: auto is {compute}"
    if compute == "float16":
        means += ", trained with a gradient scaler"
    if refused:
        means += f"; refused here: {', '.join(refused)}"
    native = [
        name
        for name, has in (
            ("bfloat16", machine.native_bf16),
            ("float16", machine.native_fp16),
            ("TF32", machine.native_tf32),
        )
        if has
    ]
    found = f"native {', '.join([*native, 'float32'])}: {machine.reason}"
    return Finding("dtypes", "ok" if machine.native_bf16 else "note", found, means)


def _refused_precisions(machine: Hardware) -> Iterator[str]:
    for asked in ("bf16", "fp16"):
        try:
            resolve_precision(asked, "float32", machine)
        except HardwareError:
            yield asked


def threads_finding(num_threads: int, num_cpus: int, asked: str) -> Finding:
    """Threads against cores; `asked` is OMP_NUM_THREADS, empty where it is unset.

    torch's own number can be lower than what was asked for: MKL does not go beyond the cores.
    Other libraries do.
    """
    found = f"torch computes with {num_threads} threads on {num_cpus} cores"
    if asked:
        found += f"; OMP_NUM_THREADS is {asked}"
    first = asked.partition(",")[0].strip()
    most = max(num_threads, int(first) if first.isdecimal() else 0)
    figures = {"num_threads": num_threads, "num_cpus": num_cpus}
    if most > num_cpus:
        means = f"more threads than cores wait for each other; set OMP_NUM_THREADS={num_cpus}"
        return Finding("threads", "note", found, means, figures)
    return Finding("threads", "ok", found, figures=figures)


def memory_finding(memory: Memory, machine: Hardware) -> Finding:
    """How large a model trains here in 4 bits, with the arithmetic."""
    where = "on the GPU" if machine.device == "cuda" else "in the host"
    compute, _ = resolve_compute_dtype("auto", machine)
    dtype_bytes = _DTYPE_BYTES[compute]
    num_bytes = (
        _QUANTIZED_SHARE * _QUANTIZED_BITS / 8
        + (1 - _QUANTIZED_SHARE) * dtype_bytes
        + _LORA_SHARE * _LORA_BYTES
    )
    room = memory.total_bytes * _USABLE_SHARE - _RESERVED_BYTES
    found = (
        f"{memory.total_bytes / _GIB:.1f} GiB {where}, {memory.free_bytes / _GIB:.1f} GiB free now"
    )
    figures = {"total_bytes": memory.total_bytes, "free_bytes": memory.free_bytes}
    if room <= 0:
        return Finding("memory", "note", found, "too little for any but tiny models", figures)
    billions = room / num_bytes / 1e9
    means = (
        f"models up to about {billions:.2g} B parameters in 4 bits: "
        f"({memory.total_bytes / _GIB:.1f} GiB × {_USABLE_SHARE} − 2 GiB) / {num_bytes:.2f} bytes "
        f"per parameter ({_QUANTIZED_SHARE} × {_QUANTIZED_BITS} bits, "
        f"{1 - _QUANTIZED_SHARE:.1f} × {dtype_bytes} bytes in {compute}, "
        f"LoRA {_LORA_SHARE} × {_LORA_BYTES} bytes)"
    )
    return Finding("memory", "ok", found, means, {**figures, "billion_parameters": billions})


def speed_finding(outcome: Outcome) -> Finding:
    """How fast matrices are multiplied, and what that allows a model of 1 B parameters at most."""
    if outcome.fault:
        return Finding("speed", "note", f"could not be measured: {outcome.fault}")
    rate: float = outcome.value
    tokens = rate / _OPERATIONS / 1e9
    means = (
        f"a model of 1 B parameters trains at {tokens:,.{0 if tokens >= 10 else 1}f} tokens/s at "
        f"the very most ({_OPERATIONS} operations per parameter and token)"
    )
    found = f"{rate / 1e9:,.0f} GFLOP/s in a matrix product"
    return Finding("speed", "ok", found, means, {"operations_per_second": rate})


def four_bit_finding(outcome: Outcome) -> Finding:
    """Whether bitsandbytes' 4-bit layer really runs here, forward and backward."""
    means = "no 4-bit base; quantization.load_in_4bit: false trains in 16 or 32 bits"
    if outcome.fault:
        return Finding("4-bit", "broken", f"bitsandbytes does not run: {outcome.fault}", means)
    error: FourBit = outcome.value
    found = (
        f"NF4 quantizes and dequantizes with a relative error of {error.weight_error:.3f} "
        f"(0.09 is right); products off by {error.forward_error:.0e} forward, "
        f"{error.backward_error:.0e} backward"
    )
    product_error = max(error.forward_error, error.backward_error)
    figures = dict(vars(error))
    # Written so that a NaN counts as too large.
    if not (error.weight_error <= _MAX_WEIGHT_ERROR and product_error <= _MAX_PRODUCT_ERROR):
        return Finding("4-bit", "broken", found, f"the numbers are wrong: {means}", figures)
    return Finding("4-bit", "ok", found, figures=figures)


def optimizer_finding(outcome: Outcome, device: str) -> Finding:
    """Whether paged AdamW in 8 bits, the default on a GPU alone, really steps here."""
    means = "set train.optim: adamw_torch_fused, with 8 bytes a trained number and not 2"
    status: Status = "broken"
    if device == "cpu":
        status, means = "note", "train.optim: auto is torch's own AdamW here, and needs it not"
    if outcome.fault:
        return Finding("optimizer", status, f"8-bit AdamW fails: {outcome.fault}", means)
    error: float = outcome.value
    found = f"five steps of paged 8-bit AdamW are {error:.1%} off those of torch's"
    figures = {"relative_error": error}
    if not error <= _MAX_OPTIMIZER_ERROR:
        return Finding("optimizer", status, found, means, figures)
    return Finding("optimizer", "ok", found, figures=figures)
