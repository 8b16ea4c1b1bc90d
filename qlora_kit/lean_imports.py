"""Imports without what no verb needs: half of the time.

transformers imports scikit-learn, SciPy, torchao and datasets wherever they are installed, for
assisted generation, the losses of object detection, bases that torchao quantized, and tables that a
trainer is given, none of which is done here. It parses what every installed distribution says of
itself, and opens all of its own files. bitsandbytes asks torch for two compiled functions when it
is imported, for which torch loads its compiler. And Python looks for garbage again and again among
objects that imports have made and nobody lets go: while modules are imported, and whenever a
quarter as many have been made since.
"""

from __future__ import annotations

import gc
import importlib.metadata
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NOT_NEEDED = ("sklearn", "scipy", "torchao", "datasets")


def import_leanly() -> None:
    """From here on this package's modules, and what they bring, are imported so.

    For a process that is this program's own: in another's transformers would not find SciPy, and
    its trainer would not know a table of datasets.
    """
    if not is_lean():
        sys.meta_path.insert(0, _Lean())


def is_lean() -> bool:
    """Whether this process imports so."""
    return any(isinstance(finder, _Lean) for finder in sys.meta_path)


class _Lean(MetaPathFinder):
    """Finds modules where they are, and runs them with what is spared out of reach."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        own = _uncollected if fullname.startswith("qlora_kit.") else None
        lean = _LEAN.get(fullname, own)
        found = PathFinder.find_spec(fullname, path, target) if lean else None
        if lean is None or found is None or found.loader is None:
            return None
        run = found.loader.exec_module
        found.loader.exec_module = _within(lean, run)  # type: ignore[assignment, method-assign]
        return found


def _within(
    lean: Callable[[], AbstractContextManager[None]], run: Callable[[ModuleType], None]
) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        with lean():
            run(module)

    return exec_module


@contextmanager
def _uncollected() -> Iterator[None]:
    """What imports make is not looked through for garbage before the outermost is done, and what
    is there once transformers has come never: a million objects, which stay as long as the process
    but for a few.
    """
    if not gc.isenabled():
        yield
        return
    was_there = "transformers" in sys.modules  # so maybe a model, which somebody may let go
    gc.disable()
    try:
        yield
        if not was_there and "transformers" in sys.modules:
            gc.freeze()
    finally:
        gc.enable()


@contextmanager
def _lean_transformers() -> Iterator[None]:
    """transformers asks once whether a package is there and keeps the answer; afterwards all others
    find these packages as before.
    """
    parsed = importlib.metadata.packages_distributions
    hidden = [name for name in _NOT_NEEDED if name not in sys.modules]
    importlib.metadata.packages_distributions = distributions_of_packages
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
        utils = sys.modules.get("transformers.utils")
        for name in hidden:
            is_available = getattr(utils, f"is_{name}_available", None)
            if is_available is not None:
                is_available()
    finally:
        importlib.metadata.packages_distributions = parsed
        for name in hidden:
            sys.modules.pop(name, None)


@contextmanager
def _lean_import_utils() -> Iterator[None]:
    """What transformers is about to make of all its files is remembered."""
    yield
    utils: Any = sys.modules["transformers.utils.import_utils"]
    create = getattr(utils, "create_import_structure_from_path", None)
    if create is not None:
        from qlora_kit.import_structure import remembering

        utils.create_import_structure_from_path = remembering(create)


@contextmanager
def _lean_bitsandbytes() -> Iterator[None]:
    """What it has compiled on import is compiled when it is called first."""
    import torch

    compile_now = torch.compile

    @wraps(compile_now)
    def compile_later(model: Any = None, **settings: Any) -> Any:
        if model is None:
            return lambda function: compile_later(function, **settings)
        compiled: list[Any] = []

        @wraps(model)
        def compiled_at_first_call(*given: Any, **named: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(model, **settings))
            return compiled[0](*given, **named)

        return compiled_at_first_call

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now


_LEAN = {
    "transformers": _lean_transformers,
    "transformers.utils.import_utils": _lean_import_utils,
    "bitsandbytes": _lean_bitsandbytes,
}


def distributions_of_packages() -> dict[str, list[str]]:
    """What importlib.metadata.packages_distributions says, without parsing whole metadata, and
    without asking of each file whether it is there: the distributions that bring a package.
    """
    bring = defaultdict(list)
    for distribution in importlib.metadata.distributions():
        name = _name_of(distribution)
        for package in _packages_of(distribution):
            bring[package].append(name)
    return dict(bring)


def _name_of(distribution: importlib.metadata.Distribution) -> str:
    for line in (distribution.read_text("METADATA") or "").splitlines():
        if line.startswith("Name: "):
            return line.removeprefix("Name: ").strip()
    return str(distribution.metadata["Name"])


def _packages_of(distribution: importlib.metadata.Distribution) -> set[str]:
    declared = (distribution.read_text("top_level.txt") or "").split()
    if declared:
        return set(declared)
    paths = (
        line.split(",", 1)[0].strip('"')
        for line in (distribution.read_text("RECORD") or "").splitlines()
    )
    return {path.split("/", 1)[0].removesuffix(".py") for path in paths if path.endswith(".py")}
