"""How the benches answer what can be foreseen: one message, exit code 1, no traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class Fault(Exception):
    """A fault of the call or of a side; the message says what, got, do."""


class Parser(argparse.ArgumentParser):
    """Of a script's options: what is wrong with them is told in one line."""

    def error(self, message: str) -> NoReturn:
        """As argparse calls it, with this project's exit code."""
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(1)


def plainly(main: Callable[[], int | None]) -> int:
    """Run a script; returns its exit code."""
    # Other tools' environments, which import this file for Fault, have no kit.
    from qlora_kit.errors import QloraKitError

    try:
        return main() or 0
    except (QloraKitError, Fault) as fault:
        print(fault, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
