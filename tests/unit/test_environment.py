"""What the machine can do: which dtype follows from it, and who may look at the environment."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qlora_kit
from qlora_kit import environment, versions
from qlora_kit.environment import (
    Hardware,
    available_cpus,
    cache_dir,
    hub_is_offline,
    probe_hardware,
    resolve_compute_dtype,
)
from qlora_kit.errors import HardwareError
from qlora_kit.recipe import Recipe
from qlora_kit.train.arguments import resolve_precision, resolve_training_dtypes
from qlora_kit.versions import describe, kit_version

PACKAGE = Path(qlora_kit.__file__).parent


def machine(kind: str) -> Hardware:
    """bf16, fp16 and TF32 of: a CPU with and without bf16 units, a T4, an A100, a GTX 1080."""
    bf16, fp16, tf32 = {
        "cpu": (False, False, False),
        "cpu with bf16": (True, False, False),
        "turing": (False, True, False),
        "ampere": (True, True, True),
        "pascal": (False, False, False),
    }[kind]
    is_cpu = kind.startswith("cpu")
    return Hardware(
        device="cpu" if is_cpu else "cuda",
        device_name=kind,
        num_devices=0 if is_cpu else 1,
        device_memory_bytes=None if is_cpu else 16 * 2**30,
        num_cpus=2,
        host_memory_bytes=8 * 2**30,
        native_bf16=bf16,
        native_fp16=fp16,
        native_tf32=tf32,
        reason=f"{kind} {'has' if bf16 else 'has no'} bfloat16 units",
    )


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [
        ("cpu", "auto", "float32"),
        ("cpu", "float32", "float32"),
        ("cpu", "bfloat16", None),
        ("cpu", "float16", None),
        ("cpu with bf16", "auto", "bfloat16"),
        ("cpu with bf16", "float16", None),
        ("cpu with bf16", "float32", "float32"),
        ("turing", "auto", "float16"),
        ("turing", "bfloat16", None),
        ("turing", "float16", "float16"),
        ("ampere", "auto", "bfloat16"),
        ("ampere", "float16", "float16"),
        ("ampere", "bfloat16", "bfloat16"),
        ("ampere", "float32", "float32"),
        ("pascal", "auto", "float32"),
        ("pascal", "float16", None),
    ],
)
def test_the_compute_dtype_follows_from_the_hardware(
    kind: str, asked: str, expected: str | None
) -> None:
    if expected is None:
        with pytest.raises(HardwareError, match=f"quantization.compute_dtype is {asked}"):
            resolve_compute_dtype(asked, machine(kind))
    else:
        assert resolve_compute_dtype(asked, machine(kind))[0] == expected


def test_the_reason_is_the_evidence() -> None:
    assert resolve_compute_dtype("auto", machine("cpu"))[1] == "cpu has no bfloat16 units"
    assert "gradient scaler" in resolve_compute_dtype("auto", machine("turing"))[1]
    assert resolve_compute_dtype("float32", machine("ampere"))[1] == "asked for"


@pytest.mark.parametrize(
    ("kind", "compute", "precision", "expected"),
    [
        ("cpu with bf16", "auto", "auto", ("bfloat16", "bf16")),
        ("cpu with bf16", "auto", "fp32", ("float32", "fp32")),
        ("cpu with bf16", "float32", "auto", ("float32", "fp32")),
        ("cpu", "auto", "auto", ("float32", "fp32")),
        ("ampere", "auto", "fp16", ("float16", "fp16")),
        ("turing", "auto", "fp32", ("float32", "fp32")),
        ("cpu", "auto", "bf16", None),
        ("turing", "auto", "bf16", None),
        ("cpu with bf16", "auto", "fp16", None),
    ],
)
def test_a_precision_that_is_asked_for_is_what_the_base_computes_in(
    kind: str, compute: str, precision: str, expected: tuple[str, str] | None
) -> None:
    """A base in bfloat16 cannot be trained without autocast."""
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": "base"},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "quantization": {"compute_dtype": compute},
            "train": {"precision": precision},
        }
    )
    if expected is None:
        with pytest.raises(HardwareError, match=f"train.precision is {precision}"):
            resolve_training_dtypes(recipe, machine(kind))
    else:
        dtypes = resolve_training_dtypes(recipe, machine(kind))
        assert (dtypes.compute, dtypes.precision) == expected


def test_what_a_refusal_offers_is_accepted() -> None:
    for kind in ("cpu", "turing"):
        with pytest.raises(HardwareError) as refused:
            resolve_compute_dtype("bfloat16", machine(kind))
        assert ("float16" in str(refused.value).replace("bfloat16", "")) == (kind == "turing")


class TestTheProbe:
    @pytest.fixture(autouse=True)
    def in_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("QLORA_KIT_CPU_BFLOAT16", raising=False)

    def test_emulated_bf16_is_never_picked_on_this_cpu(self) -> None:
        """Measured here once more, with larger matrices than the probe's."""
        if torch.cuda.is_available():
            pytest.skip("a GPU decides on this machine")

        def seconds(dtype: torch.dtype) -> float:
            left, right = torch.ones(96, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
            times = []
            for _ in range(2):
                start = time.perf_counter()
                left @ right
                times.append(time.perf_counter() - start)
            return min(times)

        if seconds(torch.bfloat16) > 5 * seconds(torch.float32):
            assert not probe_hardware().native_bf16
            assert resolve_compute_dtype("auto", probe_hardware())[0] == "float32"

    def test_a_cpu_that_claims_bf16_is_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(environment, "_onednn_has_bf16", lambda: True)
        for ratio, found in (
            (0.4, (True, True)),
            (1.9, (False, True)),  # AVX512-BF16 without AMX
            (2.5, (False, True)),
            (20.0, (False, False)),
        ):
            times = {torch.bfloat16: ratio, torch.float32: 1.0}
            monkeypatch.setattr(environment, "_product_seconds", times.__getitem__)
            assert environment._probe_cpu_bf16()[:2] == found

    def test_it_can_be_left_out_of_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(environment, "_onednn_has_bf16", lambda: True)
        monkeypatch.setattr(environment, "_product_seconds", lambda dtype: 1.0)
        assert environment._probe_cpu_bf16()[0]
        monkeypatch.setenv("QLORA_KIT_CPU_BFLOAT16", "off")
        assert environment._probe_cpu_bf16() == (False, False, "QLORA_KIT_CPU_BFLOAT16 is off")
        environment.require_known_switches()
        monkeypatch.setenv("QLORA_KIT_CPU_BFLOAT16", "nonsense")
        with pytest.raises(HardwareError, match="'nonsense'; set it to on or off"):
            environment.require_known_switches()

    def test_slow_bf16_is_taken_where_it_is_asked_for(self) -> None:
        slow = replace(machine("cpu"), slow_bf16=True)
        assert resolve_compute_dtype("auto", slow)[0] != "bfloat16"
        assert resolve_compute_dtype("bfloat16", slow)[0] == "bfloat16"
        assert resolve_precision("auto", "bfloat16", slow) == "bf16"

    def test_the_timing_shows_what_is_emulated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where oneDNN has no bf16, the clock must say so even when nobody asks oneDNN."""
        if environment._onednn_has_bf16():
            pytest.skip("this CPU has native bfloat16")
        monkeypatch.setattr(environment, "_onednn_has_bf16", lambda: True)
        native, usable, reason = environment._probe_cpu_bf16()
        assert not native
        assert not usable
        assert "times a float32 one" in reason

    def test_a_torch_without_onednn_has_no_bf16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert environment._probe_cpu_bf16()[0] is False

    @pytest.mark.parametrize(
        ("capability", "bf16", "fp16", "tf32"),
        [
            ((6, 1), False, False, False),
            ((6, 0), False, True, False),
            ((7, 0), False, True, False),
            ((7, 5), False, True, False),
            ((8, 0), True, True, True),
            ((9, 0), True, True, True),
        ],
    )
    def test_a_gpu_is_asked_without_emulation(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capability: tuple[int, int],
        bf16: bool,
        fp16: bool,
        tf32: bool,
    ) -> None:
        class Properties:
            name = "a GPU"
            major, minor = capability
            total_memory = 16 * 2**30

        def supports_bf16(including_emulation: bool = True) -> bool:
            return True if including_emulation else bf16

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supports_bf16)
        found = probe_hardware.__wrapped__()
        assert (found.device, found.native_bf16) == ("cuda", bf16)
        assert (found.native_fp16, found.native_tf32) == (fp16, tf32)
        assert f"{capability[0]}.{capability[1]}" in found.reason

    def test_this_machine(self) -> None:
        found = probe_hardware()
        assert found.num_cpus == available_cpus() >= 1
        assert found.host_memory_bytes > 2**28
        assert found.device_name
        assert describe()["hardware"]["reason"] == found.reason


class TestTheEnvironment:
    @pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
    @pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
    def test_offline(self, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        assert not hub_is_offline()
        monkeypatch.setenv(name, value)
        assert hub_is_offline()
        monkeypatch.setenv(name, "0")
        assert not hub_is_offline()

    def test_the_cache_can_be_moved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("QLORA_KIT_CACHE", raising=False)
        assert cache_dir().name == "qlora_kit"
        monkeypatch.setenv("QLORA_KIT_CACHE", "~/elsewhere")
        assert cache_dir() == Path.home() / "elsewhere"

    def test_upstream_is_quieted_but_not_against_the_user(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "environ", {"TRANSFORMERS_VERBOSITY": "debug"})
        level = logging.getLogger("bitsandbytes").level
        environment.settle_upstream()
        logging.getLogger("bitsandbytes").setLevel(level)
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"
        assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
        assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"

    def test_no_other_module_reads_it(self) -> None:
        reads = re.compile(r"\benviron\b|\bgetenv\b|\bputenv\b")
        files = sorted(PACKAGE.rglob("*.py"))
        assert len(files) > 30
        guilty = [
            str(path.relative_to(PACKAGE))
            for path in files
            if path.name != "environment.py" and reads.search(path.read_text(encoding="utf-8"))
        ]
        assert guilty == []

    def test_importing_it_imports_no_torch(self) -> None:
        code = "import sys, qlora_kit.environment; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_version_of_this_program_names_its_own_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is called from, and not that of the folder it is called in."""
    monkeypatch.chdir(tmp_path)
    here = subprocess.run(
        ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    if here.returncode != 0:
        pytest.skip("not run from a repository")
    assert here.stdout.strip() in kit_version()


def test_two_states_of_one_checkout_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    code, other = package / "environment.py", package / "other.py"
    code.write_text("one\n")
    other.write_text("one\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(versions, "__file__", str(code))
    seen = [kit_version()]
    for text in ("two\n", "three\n"):
        other.write_text(text)
        seen.append(kit_version())
    assert "with changes" not in seen[0]
    assert all(one.startswith(f"{seen[0]} with changes ") for one in seen[1:])
    assert len(set(seen)) == 3
    other.write_text("one\n")
    assert kit_version() == seen[0]
