"""Imports go only upwards in the list of rooms; `model` and `data` do not know each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import qlora_kit

PACKAGE = Path(qlora_kit.__file__).parent
ROOMS = (
    "errors",
    "recipe",
    "environment",
    "model",
    "data",
    "checkpoint",
    "train",
    "evaluate",
    "quantize",
    "export",
    "report",
    "stages",
    "run",
    "cli",
)
# What a room tells a person through, and never prints itself.
OF_ALL = "qlora_kit.report.reporter"
# Training tells of its schedule and its figures itself.
KNOWN = {("train", "qlora_kit.report")}


def imports_of(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports when it runs, wherever in the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (one.name for one in node.names)


def room_of(module: str) -> str:
    return module.split(".")[1] if module.startswith("qlora_kit.") else ""


def edges() -> Iterator[tuple[str, str, str]]:
    """File, its room, and what it imports of another room."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        room = name.parts[0].removesuffix(".py")
        for module in imports_of(path):
            if room_of(module) not in ("", room):
                yield str(name), room, module


def test_imports_go_upwards() -> None:
    found = [(name, room, module) for name, room, module in edges() if room in ROOMS]
    assert len(found) > 100
    down = [
        f"{name} imports {module}"
        for name, room, module in found
        if room_of(module) in ROOMS
        and ROOMS.index(room_of(module)) > ROOMS.index(room)
        and module != OF_ALL
        and (room, module) not in KNOWN
    ]
    assert down == []


def test_model_and_data_do_not_know_each_other() -> None:
    pair = {"model", "data"}
    known = [
        f"{name} imports {module}"
        for name, room, module in edges()
        if {room, room_of(module)} == pair
    ]
    assert known == []


def test_folders_of_tests_are_packages() -> None:
    """Else two modules of one name in different folders stop the whole collection."""
    tests = Path(__file__).parents[1]
    folders = {module.parent for module in tests.rglob("*.py")} - {tests}
    assert folders
    assert [
        str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()
    ] == []
