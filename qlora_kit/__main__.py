"""`qlora-kit`, `python -m qlora_kit` and `accelerate launch -m qlora_kit`."""

from __future__ import annotations

import sys

from qlora_kit.memory.allocator import begin_with_a_tidy_heap

_TRAINING = ("train", "plan")
"""Verbs that train, or tell what that takes."""


def main() -> None:
    """Run a verb, in a process that has begun as training needs it and imports what it needs."""
    if sys.argv[1:2] and sys.argv[1] in _TRAINING:
        begin_with_a_tidy_heap()
    from qlora_kit.lean_imports import import_leanly

    import_leanly()
    from qlora_kit.cli import main as run_verb

    run_verb()


if __name__ == "__main__":
    main()
