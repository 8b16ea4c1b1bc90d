"""Extras that are missing are told before any work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qlora_kit import extras
from qlora_kit.errors import HardwareError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_every_extra_is_one_of_pyproject() -> None:
    section = PYPROJECT.read_text().partition("[project.optional-dependencies]")[2]
    declared = set(re.findall(r"^([\w-]+) = \[", section.partition("\n[")[0], re.MULTILINE))
    assert declared >= set(extras.EXTRAS)


@pytest.mark.parametrize("name", sorted(set(extras.EXTRAS) - {"gguf"}))
def test_what_the_tests_need_is_installed(name: str) -> None:
    assert extras.has_extra(name)
    extras.require_extra(name, "a test")


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.EXTRAS, "gptq", ("json", "no_such_module_here"))
    with pytest.raises(HardwareError) as caught:
        extras.require_extra("gptq", "method gptq")
    assert str(caught.value) == (
        "method gptq needs no_such_module_here, not installed here; install with: "
        "pip install 'qlora-kit[gptq]'"
    )
    assert not extras.has_extra("gptq")
