"""What a run was made with: versions of packages and of this one, and the machine."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from qlora_kit.environment import probe_hardware

REPORTED_PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
)


def package_versions(names: Iterable[str] = REPORTED_PACKAGES) -> dict[str, str | None]:
    """Installed versions, of every package that a run depends on; None where one is missing."""
    return {name: _version(name) for name in names}


@lru_cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """What `environment.json` of a run holds, less what only the run knows."""
    from dataclasses import asdict

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "qlora_kit": _version("qlora-kit"),
        "git_commit": _git_commit(),
        "hardware": asdict(probe_hardware()),
    }


def kit_version() -> str:
    """Of this package, with the commit that it is at where it is run from a repository, and a
    digest of what was changed there since.
    """
    folder = Path(__file__).parent
    is_tracked = _git("ls-files", "--error-unmatch", Path(__file__).name, folder=folder) is not None
    commit = _git("rev-parse", "HEAD", folder=folder) if is_tracked else None
    version = _version("qlora-kit") or "not installed"
    if commit is None:
        return version
    changed = _git("diff", "HEAD", "--", ".", folder=folder)
    digest = hashlib.sha256(changed.encode()).hexdigest()[:8] if changed else ""
    return f"{version} at {commit}" + f" with changes {digest}" * bool(digest)


def _git_commit(folder: Path = Path()) -> str | None:
    """The commit that a folder (or the working directory) is at, with a + where files of its
    repository were changed since.
    """
    commit = _git("rev-parse", "HEAD", folder=folder)
    changed = _git("status", "--porcelain", "-uno", folder=folder)
    return commit and commit + ("+" if changed else "")


def _git(*arguments: str, folder: Path) -> str | None:
    """What git says in a folder; None where it is missing or refuses."""
    import subprocess

    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
