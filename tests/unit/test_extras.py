"""Extras that are missing, or of other versions, are told before any work."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

from qlora_kit import extras
from qlora_kit.errors import HardwareError

PYPROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text()
COMPILED = "llama-cpp-python"


def declared() -> dict[str, list[str]]:
    """The requirements of each extra, as `pyproject.toml` has them, one extra a line."""
    section = PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    found = re.findall(r"^([\w-]+) = \[(.*)\]$", section, re.MULTILINE)
    return {name: re.findall(r'"(.*?)"', line) for name, line in found}


def test_every_extra_is_one_of_pyproject() -> None:
    assert set(declared()) >= set(extras.EXTRAS)


def test_the_development_group_brings_what_the_extras_bring() -> None:
    group = PYPROJECT.partition("[dependency-groups]")[2].partition("\n[")[0]
    wanted = {line for name in extras.EXTRAS for line in declared()[name]}
    assert {line for line in wanted if f'"{line}"' not in group} == {f"{COMPILED}==0.3.36"}


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


def installed_is(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    """As if a package were installed in that version."""
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda one: version if one == name else real(one))


@pytest.mark.parametrize("version", ["0.13.2", "0.15.0"])
def test_another_version_than_the_extra_allows(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed_is(monkeypatch, "llmcompressor", version)
    with pytest.raises(HardwareError) as caught:
        extras.require_extra("gptq", "method gptq")
    assert str(caught.value) == (
        f"method gptq needs llmcompressor >=0.14,<0.15 ({version} is installed); install with: "
        "pip install 'qlora-kit[gptq]'"
    )
    assert not extras.has_extra("gptq")
    assert extras.has_extra("onnx"), "which does not ask for it"


def test_a_version_of_before_a_release_is_one_within_the_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed_is(monkeypatch, "llmcompressor", "0.14.1a20261020")
    assert extras.has_extra("gptq")


def test_what_is_there_but_not_known_to_pip_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that was built in its place; its version is not known."""
    real = metadata.version

    def version(name: str) -> str:
        if name == "llmcompressor":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert extras.has_extra("gptq")
