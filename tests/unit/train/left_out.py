"""A kernel that is not what it should be: left out with a reason, and all else as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qlora_kit.train.shortcuts import Shortcuts


def require_left_out_where_off(
    patch: pytest.MonkeyPatch,
    kernel: tuple[Any, str],
    factor: float,
    chosen: Callable[[], Shortcuts],
    name: str,
) -> Shortcuts:
    """Where its numbers are wrong by a factor."""
    own = getattr(*kernel)
    patch.setattr(*kernel, lambda *given: factor * own(*given))
    found = chosen()
    (why,) = found.left
    assert why.startswith(f"{name}: ")
    assert why.endswith("of their size off")
    assert found.fusion is not None, "all else is as good as before"
    return found


def require_left_out_where_it_fails(
    patch: pytest.MonkeyPatch,
    kernel: tuple[Any, str],
    chosen: Callable[[], Shortcuts],
    name: str,
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("could not create a primitive")

    patch.setattr(*kernel, fails)
    why = f"{name}: it fails (RuntimeError: could not create a primitive)"
    assert chosen().left == (why,)
