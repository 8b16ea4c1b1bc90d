"""`qlora-kit`, `python -m qlora_kit` and `accelerate launch -m qlora_kit`."""

from __future__ import annotations

import sys

from qlora_kit.memory.allocator import begin_with_a_tidy_heap

_TRAINING = ("train", "plan")
"""Verbs that train, or tell what that takes."""


def begin(trains: bool = True) -> None:
    """Go on as a process of the command line: with the heap that training needs, if need be in a
    program that begins again, and with imports of what is needed.
    """
    if trains:
        begin_with_a_tidy_heap()
    from qlora_kit.lean_imports import import_leanly

    import_leanly()


def main() -> None:
    """Run a verb."""
    begin(trains=sys.argv[1:2] != [] and sys.argv[1] in _TRAINING)
    from qlora_kit.cli import main as run_verb

    run_verb()


if __name__ == "__main__":
    main()
