"""What training has used besides the recipe, as a checkpoint keeps it: files change under their
names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qlora_kit.checkpoint.drift import Change, Drift
from qlora_kit.errors import RunError
from qlora_kit.model.configured import changed_settings

FINGERPRINTS_FILE = "fingerprints.json"
_SOURCES = "sources"
_DIGEST_CHARACTERS = 12


@dataclass(frozen=True)
class Fingerprints:
    """What training has used, as short texts that are equal only where it was the same."""

    base: str
    tokenizer: str
    chat_template: str
    data_train: str
    data_eval: str
    packages: str
    hardware: str
    compute: str = ""
    """The dtype that the products are computed in. Empty in checkpoints of earlier versions."""
    native_bf16: str = ""
    """Yes or no: what the machine was found to be, which decides what `auto` is."""
    qlora_kit: str = ""
    """Version and commit of this program. Empty, so unknown, in checkpoints of earlier ones."""
    model_config: str = ""
    """What the base's config.json holds, as JSON: the same weights may be computed with otherwise.
    Empty in checkpoints of earlier versions, and where this program has written the file."""


@dataclass(frozen=True)
class SourcePrint:
    """One source of the data as it was read, to tell which of them has changed."""

    part: str
    """`train` or `eval`."""
    name: str
    digest: str
    """Over its bytes and the names of its files."""
    num_rows: int | None
    """None where they are not counted beforehand."""

    @property
    def rows(self) -> str:
        return "" if self.num_rows is None else f"{self.num_rows:,} rows, "

    @property
    def short(self) -> str:
        return f"{self.rows}digest {self.digest[:_DIGEST_CHARACTERS]}"


Sources = Sequence[SourcePrint]

_WORDS = {
    "base": "the base's weights are others: the adapter has learned on those of before",
    "tokenizer": "the tokenizer makes other ids of the same text",
    "chat_template": "the chat template makes another text of the same messages",
    "data_train": "the training rows are others, or in another order: some are seen twice or never",
    "data_eval": "the eval rows are others: losses before and after cannot be compared",
    "packages": "the same recipe may come out otherwise in the last bits",
    "hardware": "the same recipe may come out otherwise in the last bits",
    "compute": "the products are computed in another dtype, so all numbers are others",
    "native_bf16": "auto may stand for another dtype",
    "qlora_kit": "the same recipe may come out otherwise in the last bits",
    "model_config": "with the same weights the base computes otherwise than before",
}
_ACCEPTED = ("packages", "hardware", "native_bf16", "qlora_kit")


def differences(
    saved: Fingerprints, now: Fingerprints, sources_saved: Sources = (), sources_now: Sources = ()
) -> Drift:
    """What is not the same although the recipe may be."""
    changes = [
        Change(
            field.name,
            getattr(saved, field.name),
            getattr(now, field.name),
            _WORDS[field.name],
            _detail(field.name, (saved, sources_saved), (now, sources_now)),
        )
        for field in fields(Fingerprints)
        if getattr(saved, field.name) not in ("", getattr(now, field.name))
    ]
    return Drift(
        tuple(one for one in changes if one.field in _ACCEPTED),
        tuple(one for one in changes if one.field not in _ACCEPTED),
    )


def _detail(
    field: str, saved: tuple[Fingerprints, Sources], now: tuple[Fingerprints, Sources]
) -> str:
    """What has changed within a field that says nothing to people; empty of all others."""
    if field == "model_config":
        return changed_settings(saved[0].model_config, now[0].model_config)
    kind, _, part = field.partition("_")
    return _which_sources(part, saved[1], now[1]) if kind == "data" else ""


def _which_sources(part: str, saved: Sources, now: Sources) -> str:
    """Of a part of the data: which files have changed, and how."""
    if not saved or not now:
        return ""
    told = list(_changed([one for one in saved if one.part == part], [*now], part))
    return "; ".join(told) or (
        "its files are as they were, and what is made of them is not (through a setting, the "
        "tokenizer, the files of the other part, or another version of this program)"
    )


def _changed(saved: list[SourcePrint], now: list[SourcePrint], part: str) -> Iterator[str]:
    before = {one.name: one for one in saved}
    after = {one.name: one for one in now if one.part == part}
    for name, one in before.items():
        other = after.get(name)
        if other is None:
            yield f"{name} ({one.short}) is not read any more"
        elif other.digest != one.digest:
            yield f"{name} was changed ({one.short} → {other.short})"
    yield from (f"{name} ({one.short}) is new" for name, one in after.items() if name not in before)


def fingerprints_text(now: Fingerprints, sources: Sources = ()) -> str:
    """The text of a checkpoint's `fingerprints.json`."""
    values = {**asdict(now), _SOURCES: [asdict(one) for one in sources]}
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def read_fingerprints(checkpoint: Path) -> tuple[Fingerprints, tuple[SourcePrint, ...]]:
    """What a newer version has added to the file is passed over.

    Raises:
        RunError: something is missing there, or is no text.
    """
    path = checkpoint / FINGERPRINTS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _of_another_version(path, str(error)) from None
    if not isinstance(values, dict):
        raise _of_another_version(path, "no mapping")
    known = {one.name: one.default for one in fields(Fingerprints)}
    missing = [name for name, default in known.items() if name not in values and default is MISSING]
    if missing:
        raise _of_another_version(path, f"without {', '.join(missing)}")
    given = {name: values[name] for name in known if name in values}
    wrong = [name for name, value in given.items() if not isinstance(value, str)]
    if wrong:
        raise _of_another_version(path, f"no text at {', '.join(wrong)}")
    return Fingerprints(**given), _sources_in(values.get(_SOURCES))


def _sources_in(values: Any) -> tuple[SourcePrint, ...]:
    """They only explain: those that cannot be read are left out."""
    names = {one.name for one in fields(SourcePrint)}
    entries = values if isinstance(values, list) else []
    return tuple(
        SourcePrint(**{name: one[name] for name in names})
        for one in entries
        if isinstance(one, dict) and names <= one.keys()
    )


def _of_another_version(path: Path, what: str) -> RunError:
    return RunError(
        f"{path} does not say what the run was trained on ({what}), so nobody can tell whether "
        "that is still the same: another version has written it. Go on with that one, or train "
        "anew with --fresh."
    )
