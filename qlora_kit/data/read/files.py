"""Which files a path names: itself, those in a folder, or those that a pattern fits."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.errors import DataError
from qlora_kit.recipe.data import COMPRESSED_ENDINGS, FILE_ENDINGS

# What looks like a file is never asked of the hub, even where it cannot be read or is missing.
_OTHER_ENDINGS = (".zip", ".yaml", ".md", ".xlsx", ".pkl", ".pt", ".tar", ".bz2", ".xz")

# Files that stand beside data and hold none: by name with one of these endings, and by ending.
_READ_BY_PEOPLE = (
    *("readme", "license", "licence", "notice", "citation", "changelog", "contributing"),
    *("authors", "copying", "requirements"),
)
_READ_BY_MACHINES = ("dataset_info", "dataset_infos", "dataset_dict", "state")
_PAPERS = frozenset(
    {
        *(name + ending for name in _READ_BY_PEOPLE for ending in ("", ".txt", ".html", ".pdf")),
        *(f"{name}.json" for name in _READ_BY_MACHINES),
        *("_metadata", "_common_metadata", "_success"),
    }
)
_PAPER_ENDINGS = (".md", ".rst", ".yaml", ".yml", ".lock", ".py", ".sh", ".toml", ".bib", ".cff")

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("eval", "evaluation"), "eval"),
}
_NUM_SHOWN = 5


@dataclass(frozen=True)
class Found:
    """Files with their names as shown to the user, and what was passed over, in words."""

    files: tuple[tuple[Path, str], ...]
    left_out: tuple[str, ...] = ()


def is_local(path: str) -> bool:
    """Whether this names files; a hub id is `name` or `owner/name`.

    Raises:
        DataError: the name is one that the system refuses to look up.
    """
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or glob.has_magic(path):
        return True
    if path.lower().endswith((*FILE_ENDINGS, *COMPRESSED_ENDINGS, *_OTHER_ENDINGS)):
        return True
    return _is_there(_expand(path))


def find_files(path: str, split: str) -> Found:
    """The files that are read, in order.

    Raises:
        DataError: there are none, or none of this split.
    """
    place = _expand(path)
    if not _is_there(place) and glob.has_magic(path):
        return _fitting(path, str(place), split)
    if place.is_dir():
        return _in_folder(place, path, split)
    if _is_there(place):
        return Found(((place, path),))
    if place.is_symlink():
        raise DataError(f"{path} is a link to a file that is not there; mend the link.")
    raise DataError(f"there is no file {path}{_near_miss(place)}")


def _expand(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path} cannot be looked up: {error}") from None


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return False
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be looked up: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{str(path)!r} cannot be looked up: {error}.") from None
    return True


def _near_miss(path: Path) -> str:
    """What may have been meant, as the end of the sentence."""
    try:
        neighbours = [one.name for one in path.parent.iterdir()]
    except OSError:
        return f", nor a folder {path.parent}."
    near = difflib.get_close_matches(path.name, neighbours, n=1)
    if near:
        return f"; did you mean {path.parent / near[0]}?"
    return "." if path.is_absolute() else f"; relative paths start in {Path.cwd()}."


def _in_folder(folder: Path, shown: str, split: str) -> Found:
    every = sorted(_walk(folder), key=lambda one: one.relative_to(folder).parts)
    found = [one for one in every if _is_data(one)]
    if not found:
        held = _list_of(one.relative_to(folder).as_posix() for one in every)
        raise DataError(
            f"{shown} is a folder without data files; it holds {held}, hidden files aside. "
            f"Data files end in {', '.join(FILE_ENDINGS)}, also with .gz or .zst."
        )
    others = [one.relative_to(folder).as_posix() for one in every if _is_unread(one)]
    names = {one: one.relative_to(folder).as_posix() for one in found}
    chosen, left_out = _of_split(names, shown, split)
    files = tuple((one, (Path(shown) / names[one]).as_posix()) for one in chosen)
    return Found(files, (*_words_on(others, "no data, by the name"), *left_out))


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below that is not hidden; links to folders are followed, each folder once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.")

    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        about = os.stat(parent)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(one for one in folders if not _is_hidden(one))
        yield from (Path(parent, name) for name in names if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _bare_name(path: Path) -> str:
    """The name in small letters, without what says that it is compressed."""
    name = path.name.lower()
    for ending in COMPRESSED_ENDINGS:
        name = name.removesuffix(ending)
    return name


def _is_data(path: Path) -> bool:
    return _bare_name(path).endswith(FILE_ENDINGS) and not _is_paper(path)


def _is_paper(path: Path) -> bool:
    name = _bare_name(path)
    return name in _PAPERS or name.endswith(_PAPER_ENDINGS)


def _is_unread(path: Path) -> bool:
    """Whether someone might take it for data, though it is not read."""
    return not _is_data(path) and (_bare_name(path).endswith(FILE_ENDINGS) or not _is_paper(path))


def _fitting(shown: str, pattern: str, split: str) -> Found:
    """Files that fit a pattern. It chooses them itself, so only another split than train parts
    them further."""
    every = [Path(one) for one in sorted(glob.glob(pattern, recursive=True))]
    found = [one for one in every if not one.is_dir() and not _is_paper(one)]
    if not found:
        folders = " but folders" if every else ""
        raise DataError(f"no file{folders} fits {shown}{_near_fits(pattern)}.")
    names = {one: one.as_posix() for one in found}
    papers = [one.as_posix() for one in every if not one.is_dir() and _is_paper(one)]
    left_out = _words_on(papers, "no data, by the name")
    if split != "train":
        fixed = len(_fixed_part(pattern).parts)
        below = {one: Path(*one.parts[fixed:]).as_posix() for one in found}
        found, others = _of_split(below, shown, split)
        left_out = (*left_out, *others)
    return Found(tuple((one, names[one]) for one in found), left_out)


def _fixed_part(pattern: str) -> Path:
    """The folder in which the pattern begins."""
    parts: list[str] = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _near_fits(pattern: str) -> str:
    folder = _fixed_part(pattern)
    try:
        names = sorted(one.name for one in folder.iterdir() if not _is_hidden(one.name))
    except OSError:
        return f"; there is no folder {folder}"
    near = difflib.get_close_matches(Path(pattern).name, names, n=3, cutoff=0.4)
    if near:
        return f"; {folder} holds {', '.join(near)}"
    return f"; {folder} holds {_list_of(names)}"


def _of_split(names: dict[Path, str], shown: str, split: str) -> tuple[list[Path], tuple[str, ...]]:
    """Those of the files whose names, or whose folders' names, have the split among their words;
    and what is said of those whose names have no split, where they are left out for it.

    Where no name has such a word, all are train; a file whose name has none, beside others with
    one, is train as well, unless there are others that say so.
    """
    splits = {path: _split_of(name) for path, name in names.items()}
    known = {one for one in splits.values() if one is not None}
    wanted = _SPLITS.get(split, split)
    if wanted == "train" and "train" not in known:
        chosen = [path for path, one in splits.items() if one is None]
    elif wanted in known:
        chosen = [path for path, one in splits.items() if one == wanted]
    else:
        run = _words(split)
        chosen = [path for path, name in names.items() if _has_run(_words(name), run)]
    if not chosen:
        there = sorted(known | ({"train"} if None in splits.values() else set()))
        raise DataError(
            f"{shown} has no split '{split}'; by the names of its files it has {', '.join(there)}."
        )
    if wanted != "train" or "train" not in known:
        return chosen, ()
    nameless = (names[path] for path, one in splits.items() if one is None)
    return chosen, _words_on(nameless, "the name has no split, and those of others have train")


def _split_of(name: str) -> str | None:
    """By the file's own name, else by the nearest folder that has such a word."""
    for part in reversed(Path(name).parts):
        for word in _words(part):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", name.lower()) if word]


def _has_run(words: list[str], run: list[str]) -> bool:
    """Whether the run occurs in the words, without a gap."""
    starts = range(len(words) - len(run) + 1)
    return bool(run) and any(words[start : start + len(run)] == run for start in starts)


def _words_on(names: Iterable[str], why: str) -> tuple[str, ...]:
    return tuple(f"{name} ({why})" for name in names)


def _list_of(names: Iterable[str]) -> str:
    every = list(names)
    if not every:
        return "nothing"
    rest = len(every) - _NUM_SHOWN
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(every[:_NUM_SHOWN]) + more
