"""A run goes on in the dtype that it began in, whatever a timed probe says beside other work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_kit.checkpoint.entry import as_it_was
from qlora_kit.checkpoint.fingerprints import FINGERPRINTS_FILE, Fingerprints, fingerprints_text
from qlora_kit.environment import Hardware, probe_hardware, resolve_compute_dtype


def machine(native: bool) -> Hardware:
    found = replace(probe_hardware(), device="cpu", device_name="a CPU", native_fp16=False)
    return replace(found, native_bf16=native, slow_bf16=not native)


def checkpoint(folder: Path, **fields: str) -> Path:
    saved = Fingerprints("b", "t", "c", "d", "e", "p", **fields)
    (folder / FINGERPRINTS_FILE).write_text(fingerprints_text(saved))
    return folder


@pytest.mark.parametrize(("then", "dtype"), [("yes", "bfloat16"), ("no", "float32")])
def test_the_same_machine_is_what_it_was(tmp_path: Path, then: str, dtype: str) -> None:
    begun = checkpoint(tmp_path, hardware="a CPU", native_bf16=then)
    for native in (True, False):
        found = as_it_was(machine(native), begun)
        assert resolve_compute_dtype("auto", found)[0] == dtype


def test_another_machine_is_what_it_is(tmp_path: Path) -> None:
    begun = checkpoint(tmp_path, hardware="another", native_bf16="yes")
    assert as_it_was(machine(False), begun) == machine(False)
    assert as_it_was(machine(False), None) == machine(False)


def test_a_checkpoint_of_an_earlier_version_says_nothing(tmp_path: Path) -> None:
    assert as_it_was(machine(False), checkpoint(tmp_path, hardware="a CPU")) == machine(False)
