"""What a measurement means, on machines that are described instead of had."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_kit.doctor import findings
from qlora_kit.doctor.apart import Outcome
from qlora_kit.doctor.probes import FourBit, Memory, TorchBuild
from qlora_kit.environment import Hardware
from qlora_kit.packages import Package, required_packages

GIB = 1024**3
CPU = Hardware("cpu", "A CPU", 0, None, 8, 24 * GIB, False, False, False, "it has no bfloat16")
AMPERE = Hardware("cuda", "A GPU", 1, 24 * GIB, 16, 64 * GIB, True, True, True, "it has units")
TURING = replace(AMPERE, native_bf16=False, native_tf32=False, reason="it has no bfloat16 units")
CUDA_BUILD = TorchBuild("2.14.0", "CUDA 13.0", False, 8)
CPU_BUILD = TorchBuild("2.14.0", None, False, 8)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU driver."""
    monkeypatch.setattr(findings.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_dtypes_of_a_cpu_without_bfloat16() -> None:
    finding = findings.dtype_finding(CPU)
    assert finding.status == "note"
    assert finding.found == "native float32: it has no bfloat16"
    assert finding.means == (
        "compute_dtype: auto is float32; refused here: train.precision: bf16, "
        "train.precision: fp16, train.tf32: true"
    )


def test_dtypes_of_gpus() -> None:
    assert findings.dtype_finding(AMPERE).means == "compute_dtype: auto is bfloat16"
    assert findings.dtype_finding(AMPERE).status == "ok"
    means = findings.dtype_finding(TURING).means
    assert means == (
        "compute_dtype: auto is float16, trained with a gradient scaler; refused here: "
        "train.precision: bf16, train.tf32: true"
    )


def test_a_gpu_is_there_but_torch_is_not_built_for_it(driver: None) -> None:
    finding = findings.device_finding(CPU, CPU_BUILD)
    assert finding.status == "missing"
    assert "install a CUDA build" in finding.means
    assert "hidden by CUDA_VISIBLE_DEVICES" in findings.device_finding(CPU, CUDA_BUILD).means


def test_no_gpu_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings.shutil, "which", lambda name: None)
    monkeypatch.setattr(findings.Path, "exists", lambda path: False)
    assert "trains on the CPU" in findings.device_finding(CPU, CUDA_BUILD).means
    assert findings.device_finding(AMPERE, CUDA_BUILD).status == "ok"


def test_memory_shows_its_arithmetic() -> None:
    finding = findings.memory_finding(Memory(24 * GIB, 20 * GIB), CPU)
    # (24 × 0.8 − 2) GiB / (0.9 × 4.127 / 8 + 0.1 × 4 + 0.005 × 10)
    assert finding.figures["billion_parameters"] == pytest.approx(17.2 * GIB / 0.9142875 / 1e9)
    assert finding.means.startswith(
        "models up to about 20 B parameters in 4 bits: (24.0 GiB × 0.8 − 2 GiB) / 0.91 bytes"
    )
    on_gpu = findings.memory_finding(Memory(24 * GIB, 20 * GIB), AMPERE)
    assert on_gpu.figures["billion_parameters"] == pytest.approx(17.2 * GIB / 0.7142875 / 1e9)
    assert findings.memory_finding(Memory(GIB, GIB), CPU).status == "note"


@pytest.mark.parametrize(
    ("num_threads", "asked", "status"),
    [
        (8, "", "ok"),
        (8, "8", "ok"),
        (64, "", "note"),
        (8, "64", "note"),
        (8, "64,4", "note"),
        (8, "x", "ok"),
    ],
)
def test_more_threads_than_cores(num_threads: int, asked: str, status: str) -> None:
    finding = findings.threads_finding(num_threads, 8, asked)
    assert finding.status == status
    assert ("set OMP_NUM_THREADS=8" in finding.means) == (status == "note")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (FourBit(0.092, 1e-7, 1e-7), "ok"),
        (FourBit(0.3, 1e-7, 1e-7), "broken"),
        (FourBit(0.092, 1e-7, 0.5), "broken"),
        (FourBit(0.092, float("nan"), 1e-7), "broken"),
        (FourBit(float("nan"), 1e-7, 1e-7), "broken"),
    ],
)
def test_4_bit_numbers_are_judged(error: FourBit, status: str) -> None:
    assert findings.four_bit_finding(Outcome(error, "")).status == status


def test_what_does_not_run_is_broken_and_says_why() -> None:
    fault = Outcome(None, "ImportError: no such library")
    for judge in (
        findings.torch_finding,
        findings.four_bit_finding,
        lambda outcome: findings.optimizer_finding(outcome, "cuda"),
        lambda outcome: findings.packages_finding("3.12.0", outcome),
    ):
        finding = judge(fault)
        assert finding.status == "broken"
        assert "no such library" in finding.found
    assert findings.speed_finding(fault).status == "note"


@pytest.mark.parametrize(("error", "status"), [(0.01, "ok"), (0.9, "broken")])
def test_optimizer_error_is_judged(error: float, status: str) -> None:
    assert findings.optimizer_finding(Outcome(error, ""), "cuda").status == status


def test_on_a_cpu_nothing_needs_8_bits() -> None:
    for outcome in (Outcome(0.9, ""), Outcome(None, "ImportError: no such library")):
        assert findings.optimizer_finding(outcome, "cpu").status == "note"
    assert findings.optimizer_finding(Outcome(0.01, ""), "cpu").status == "ok"


def test_packages_out_of_range_are_named() -> None:
    packages = (
        Package("torch", "2.14.0", ">=2.11", True),
        Package("peft", "0.10.0", ">=0.21.2,<0.22", False),
        Package("gguf", None, ">=0.19", False),
    )
    finding = findings.packages_finding("3.12.0", Outcome(packages, ""))
    assert finding.status == "broken"
    assert (
        finding.found == "peft 0.10.0, needed >=0.21.2,<0.22; gguf is not installed, needed >=0.19"
    )
    assert findings.packages_finding("3.12.0", Outcome((), "")).status == "note"


def test_required_packages_come_from_the_kit_s_own_metadata() -> None:
    packages = {package.name: package for package in required_packages()}
    assert {"torch", "transformers", "bitsandbytes", "peft", "pydantic"} <= set(packages)
    assert packages["transformers"].needed == ">=5.17,<6"
    assert not {"wandb", "mlflow-skinny", "tensorboard"} & set(packages)  # extras
    assert {package.name for package in required_packages("onnx")} == {
        "onnx",
        "onnxscript",
        "onnxruntime",
    }
