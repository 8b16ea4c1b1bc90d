"""How the benches answer what can be foreseen: one message, exit code 1, no traceback."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_PLOTS = (".png", ".svg", ".pdf")
# Torch logs that torchao registers what it need not.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


class Fault(Exception):
    """A fault of the call or of a side; the message says what, got, do."""


class Parser(argparse.ArgumentParser):
    """Of a script's options: what is wrong with them is told in one line."""

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse has it; what an option is where nobody sets it is told too."""
        told, default = settings.get("help", ""), settings.get("default")
        untold = default is None or default is False or default is argparse.SUPPRESS
        if not untold and "unset" not in told:
            settings["help"] = f"{told} (default: %(default)s)".strip()
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """As argparse calls it, with this project's exit code."""
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(1)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` on."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text}")
        return int(text)

    return number


def output_file(text: str) -> Path:
    """The type of an option that names a file to write once all is measured: its folder has to be
    there before anything is.
    """
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is no folder; make it first")
    return path


def plot_file(text: str) -> Path:
    """As `output_file`, in a format that is known by its ending."""
    path = output_file(text)
    if path.suffix not in _PLOTS:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(_PLOTS)}, got {text}")
    return path


def existing_folder(text: str) -> Path:
    """The type of an option that names a folder to read."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def existing_file(text: str) -> Path:
    """The type of an option that names a file to read."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is no file")
    return path


def plainly(main: Callable[[], int | None]) -> int:
    """Run a script; returns its exit code."""
    # Other tools' environments, which import this file for Fault, have no kit.
    from qlora_kit.errors import QloraKitError

    # Loggers alone: what stands in the environment reaches the tools that a bench starts.
    for name in ("bitsandbytes", "torch.utils._pytree"):  # of kernels that nothing here uses
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return main() or 0
    except (QloraKitError, Fault) as fault:
        print(fault, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
