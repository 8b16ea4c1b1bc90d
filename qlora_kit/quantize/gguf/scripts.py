"""llama.cpp's own scripts: where they come from, and how they are run.

They are no package of their own on the index, but the source package of llama-cpp-python carries
the llama.cpp that it binds: what converts and what runs are of one version.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.atomic import ANOTHER_CACHE, draft_beside, require_disk
from qlora_kit.environment import cache_dir, llama_cpp_checkout
from qlora_kit.errors import ModelError
from qlora_kit.model.fetch import PinnedPackage, fetch_package, requirements_of, source_commands

logger = logging.getLogger(__name__)

LLAMA_CPP_SOURCE = PinnedPackage(
    requirement="llama-cpp-python==0.3.36",
    file_name="llama_cpp_python-0.3.36.tar.gz",
    sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    carries="llama.cpp's conversion scripts",
)

CONVERT = "convert_hf_to_gguf.py"
CONVERT_LORA = "convert_lora_to_gguf.py"
_PARTS = (CONVERT, CONVERT_LORA, "conversion", "gguf-py", "LICENSE")
_ROOT = "llama_cpp_python-0.3.36/vendor/llama.cpp"
_NEEDED_BYTES = 200_000_000

# What each script runs under: its own gguf library before an installed one, and nothing of the
# folder that the user stands in.
_START = (
    "import runpy, sys; folder, script = sys.argv[1:3]; del sys.argv[:2]; "
    "sys.path[0:1] = [folder, folder + '/gguf-py']; "
    "runpy.run_path(script, run_name='__main__')"
)


@dataclass(frozen=True)
class LlamaCpp:
    """A llama.cpp tree, or what of it is needed."""

    folder: Path
    origin: str
    """What it is, for a record: the pinned package, or the checkout that the user named."""
    quantizer: Path | None = None
    """The `llama-quantize` that was built in a checkout."""


def find_llama_cpp(checkout: Path | None = None) -> LlamaCpp:
    """The checkout that the user names, here or for all, or the scripts of the pinned package,
    fetched once.

    Raises:
        ModelError: the checkout is none, or the package cannot be fetched.
        HardwareError: no room on the disk.
    """
    if checkout is not None:
        return _checkout(checkout.expanduser().resolve())
    for_all = checkout_for_all()
    if for_all is not None:
        return for_all
    name = LLAMA_CPP_SOURCE.requirement
    folder = cache_dir() / "llama.cpp" / name.replace("==", "-")
    if not folder.exists():
        _fetch(folder)
    _require_parts(folder, f"remove {folder}, and they are fetched again")
    return LlamaCpp(folder, name)


def checkout_for_all() -> LlamaCpp | None:
    """The one that the environment names, for every verb and recipe.

    Raises:
        ModelError: it is none.
    """
    folder = llama_cpp_checkout()
    if folder is None:
        return None
    if not folder.is_dir():
        raise ModelError(
            f"QLORA_KIT_LLAMA_CPP names {folder}, and there is no such folder; set it to a "
            "checkout of llama.cpp, or unset it."
        )
    return _checkout(folder.resolve())


def run_script(llama: LlamaCpp, script: Path, arguments: Sequence[str]) -> str:
    """Run one in a process of its own, which a fault of it cannot take ours down with.

    Returns:
        What it wrote to stderr: its log.

    Raises:
        ScriptFailed: it ended with an error.
    """
    command = [sys.executable, "-c", _START, str(llama.folder), str(script), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    logger.debug("%s %s: %s", script.name, " ".join(arguments), done.stderr)
    if done.returncode != 0:
        raise ScriptFailed(script.name, done.stderr)
    return done.stderr


class ScriptFailed(ModelError):
    """One of llama.cpp's scripts ended with an error; `log` is all that it wrote."""

    def __init__(self, script: str, log: str):
        self.script = script
        self.log = log
        super().__init__(f"llama.cpp's {script} failed: {last_line(log)}")

    def __reduce__(self) -> tuple[type[ScriptFailed], tuple[str, str]]:
        return type(self), (self.script, self.log)


def last_line(log: str) -> str:
    """The last line that says something: of a traceback, the error itself."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _checkout(folder: Path) -> LlamaCpp:
    if not folder.is_dir():
        raise ModelError(
            f"there is no folder {folder}; llama_cpp=PATH names a checkout of llama.cpp."
        )
    _require_parts(folder, "name the top folder of a checkout of llama.cpp, of 2026 or later")
    built = [folder / "build" / "bin" / "llama-quantize", folder / "llama-quantize"]
    return LlamaCpp(
        folder,
        f"the checkout {folder.resolve().name}",
        next((one for one in built if one.is_file()), None),
    )


def _require_parts(folder: Path, remedy: str) -> None:
    missing = [part for part in _PARTS[:-1] if not (folder / part).exists()]
    if missing:
        raise ModelError(f"{folder} lacks llama.cpp's {', '.join(missing)}; {remedy}.")


def _fetch(folder: Path) -> None:
    pin = LLAMA_CPP_SOURCE
    require_disk(folder.parent, _NEEDED_BYTES, pin.carries, ANOTHER_CACHE)
    by_hand = cache_dir() / "llama.cpp" / pin.file_name
    package = pin.requirement.partition("==")[0]
    with draft_beside(folder) as scratch:
        commands = source_commands(package, requirements_of(pin, scratch), scratch)
        remedy = (
            f"fetch {pin.file_name} elsewhere (`pip download --no-deps --no-binary={package} "
            f"{pin.requirement}`) and put it at {by_hand}; or name a checkout of llama.cpp with "
            "llama_cpp=PATH."
        )
        archive = fetch_package(pin, commands, scratch, by_hand, remedy)
        assert archive is not None, "pip leaves a source package as it is"
        _publish(_unpack(archive, scratch / "unpacked"), folder)


def _unpack(archive: Path, target: Path) -> Path:
    """Only what is needed, and only plain files and folders of it."""
    wanted = tuple(f"{_ROOT}/{part}" for part in _PARTS)
    with tarfile.open(archive) as package:
        for member in package:
            is_wanted = member.name.startswith(tuple(f"{one}/" for one in wanted))
            if (is_wanted or member.name in wanted) and (member.isfile() or member.isdir()):
                package.extract(member, target, filter="data")
    return target / _ROOT


def _publish(unpacked: Path, folder: Path) -> None:
    """Of two processes that fetch it the first wins."""
    try:
        unpacked.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(unpacked)
