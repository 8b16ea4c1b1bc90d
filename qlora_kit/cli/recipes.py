"""`qlora-kit recipes`: the recipes that ship with the kit; list, show, copy."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.cli.arguments import AsJson
from qlora_kit.errors import QloraKitError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

NAME = "recipes"

_FOLDER = "recipes"
_FIRST = "quickstart"


class Action(str, Enum):
    """What to do with the recipes."""

    LIST = "list"
    SHOW = "show"
    COPY = "copy"


@dataclass(frozen=True)
class Shipped:
    """A recipe that ships with the kit; `memory` is its header's words on what it needs."""

    name: str
    model: str
    memory: str


def command(
    action: Annotated[
        Action, typer.Argument(metavar="list|show|copy", help="What to do.")
    ] = Action.LIST,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Which one, as `list` names it.")
    ] = None,
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="DEST", help="copy: a file that is not there yet, or a folder."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the recipes that ship with the kit, show one, or copy one to start from."""
    if action is Action.LIST and name is not None:
        raise typer.BadParameter(f"`list` takes no name; to read one: recipes show {name}")
    if action is not Action.LIST and name is None:
        raise typer.BadParameter(f"`{action.value}` needs a NAME; `recipes list` has them.")
    if action is not Action.COPY and destination is not None:
        raise typer.BadParameter("only `copy` takes a DEST.")
    if as_json and action is not Action.LIST:
        raise typer.BadParameter("only `list` has --json.")
    files = shipped_files()
    if name is None:
        _list(files, as_json)
        return
    found = _find(files, name)
    text = files[found].read_text(encoding="utf-8")
    if action is Action.SHOW:
        print(text, end="")
    else:
        _copy(found, text, destination)


def shipped_files() -> dict[str, Traversable]:
    """Every recipe by name, quickstart first: the installed package's, else the checkout's.

    Raises:
        QloraKitError: there are none.
    """
    from importlib import resources

    package = resources.files("qlora_kit")
    checkout = Path(__file__).parents[2]
    for root in (package, checkout):
        folder = root.joinpath(_FOLDER)
        if folder.is_dir():
            found = dict(_walk(folder, ""))
            return {name: found[name] for name in sorted(found, key=lambda n: (n != _FIRST, n))}
    raise QloraKitError(
        f"no recipes are here: neither in the installed package nor in {checkout / _FOLDER}; "
        "install the kit again."
    )


def describe(name: str, text: str) -> Shipped:
    """What `list` says about a recipe: its model, and what its header says of memory."""
    import yaml

    memory = re.search(r"^#.*\bMemory: *(.*)", text, re.MULTILINE)
    model = yaml.safe_load(text)["model"]["name_or_path"]
    return Shipped(name, model, memory[1].rstrip(" .") if memory else "")


def retarget(text: str, name: str, destination: Path) -> str:
    """`text` with the commands of its header naming the copy instead of the shipped file."""
    header = _header(text)
    shipped = f"{_FOLDER}/{name}.yaml"
    renamed = [line.replace(shipped, shlex.quote(destination.as_posix())) for line in header]
    return "\n".join([*renamed, *text.split("\n")[len(header) :]])


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    """Recipes below a folder; other YAML files (launcher settings) name no model."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            text = entry.read_text(encoding="utf-8")
            if re.search(r"^model:", text, re.MULTILINE):
                yield prefix + entry.name.removesuffix(".yaml"), entry


def _header(text: str) -> list[str]:
    """The comment lines that open a recipe."""
    lines = text.split("\n")
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:end]


def _list(files: dict[str, Traversable], as_json: bool) -> None:
    described = [describe(name, file.read_text(encoding="utf-8")) for name, file in files.items()]
    if as_json:
        print(json.dumps([asdict(one) for one in described], indent=2, ensure_ascii=False))
        return
    from qlora_kit.cli.console import console_reporter

    width = max((len(one.name) for one in described), default=0)
    model_width = max((len(one.model) for one in described), default=0)
    reporter = console_reporter()
    for one in described:
        reporter.say(f"{one.name:{width}}  {one.model:{model_width}}  {one.memory}".rstrip())
    reporter.say("")
    reporter.say("Start from one: qlora-kit recipes copy NAME")


def _copy(name: str, text: str, destination: Path | None) -> None:
    path = (destination or Path()).expanduser()
    if path.is_dir():
        path = path / f"{Path(name).name}.yaml"
    try:
        with path.open("x", encoding="utf-8") as copy:
            copy.write(retarget(text, name, path))
    except FileExistsError:
        raise QloraKitError(
            f"{path} is there already and was not touched; name another file: "
            f"qlora-kit recipes copy {name} OTHER.yaml"
        ) from None
    except OSError as error:
        raise QloraKitError(f"{path} cannot be written: {error.strerror}.") from None
    print(f"{path} is yours; begin with: qlora-kit check {shlex.quote(str(path))}")


def _find(files: dict[str, Traversable], name: str) -> str:
    from difflib import get_close_matches

    wanted = name.removeprefix(f"{_FOLDER}/").removesuffix(".yaml")
    if wanted in files:
        return wanted
    close = get_close_matches(wanted, files, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(files)}."
    raise QloraKitError(f"no recipe is called {wanted}; {hint}")
