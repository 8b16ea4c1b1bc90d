"""Whether what an artifact was made from is still there, and still the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_kit.artifact.record import (
    AdapterRef,
    BaseRef,
    MadeFrom,
    ParentRef,
    is_artifact,
    read_record,
    verify_artifact,
)
from qlora_kit.errors import QloraKitError
from qlora_kit.records import file_sha256

Role = Literal["itself", "parent", "adapter", "base", "recipe"]

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Link:
    """One thing that was looked at: the folder itself, or something that it was made from."""

    role: Role
    kind: str
    name: str
    """A path, or the name of a base."""
    faults: tuple[str, ...] = ()
    unchecked: str = ""
    """Why nothing can be said, where that is so: a base of the hub that is not on this machine."""
    num_files: int | None = None

    @property
    def holds(self) -> bool:
        return not self.faults


def trace(origin: MadeFrom, allow_pickle: bool = False) -> list[Link]:
    """Walk a chain back to its base; what an artifact inherits is checked once, at its end."""
    links: list[Link] = []
    seen: set[str] = set()
    parent = origin.parent
    while parent is not None and parent.path not in seen:
        seen.add(parent.path)
        link = parent_link(parent)
        links.append(link)
        folder = Path(parent.path)
        parent = read_record(folder).made_from.parent if link.holds else None
    if origin.adapter is not None:
        links.append(adapter_link(origin.adapter))
        recipe = Path(origin.adapter.path).parent / _RECIPE_FILE
        if origin.recipe_sha256 is not None and recipe.is_file():
            links.append(recipe_link(recipe, origin.recipe_sha256))
    if origin.base is not None:
        links.append(base_link(origin.base, allow_pickle))
    return links


def parent_link(parent: ParentRef) -> Link:
    """The artifact that another was made from: there, the same one, and whole."""
    folder = Path(parent.path)
    if not folder.is_dir():
        faults: tuple[str, ...] = ("is not there any more",)
    elif not is_artifact(folder):
        faults = ("has lost its artifact.json",)
    else:
        faults = verify_artifact(folder)
        if not faults and read_record(folder).sha256 != parent.sha256:
            faults = ("is another one than it was made from: it was made again since",)
    return Link("parent", parent.kind, parent.path, faults)


def adapter_link(adapter: AdapterRef) -> Link:
    """The adapter that something was made from: there, with the same weights."""
    weights = Path(adapter.path) / _ADAPTER_WEIGHTS
    if not weights.is_file():
        faults: tuple[str, ...] = ("is not there any more",)
    elif file_sha256(weights) != adapter.sha256:
        faults = ("is another one than it was made from: its weights differ",)
    else:
        faults = ()
    return Link("adapter", "adapter", adapter.path, faults)


def recipe_link(path: Path, sha256: str) -> Link:
    """The recipe of a run, whose hash may be over the keys that were set, or over every field."""
    from qlora_kit.recipe import load_written_out
    from qlora_kit.recipe.identity import every_field_hash, recipe_hash

    try:
        recipe = load_written_out(path)
        same = sha256 in (recipe_hash(recipe), every_field_hash(recipe))
        faults = () if same else ("is another one than it was made with",)
    except QloraKitError as error:
        faults = (f"cannot be read: {error}",)
    return Link("recipe", "recipe", str(path), faults)


def base_link(base: BaseRef, allow_pickle: bool = False) -> Link:
    """The base by the fingerprint of its weights; a hub's only where it is on this machine."""
    from qlora_kit.model.scan import scan_weights
    from qlora_kit.model.source import looks_local, resolve_source

    if base.fingerprint is None:
        return Link("base", "base", base.name, unchecked="its fingerprint was not recorded")
    try:
        source = resolve_source(
            base.name, base.revision, base.gguf_file, allow_pickle, local_only=True
        )
        fingerprint = scan_weights(source.folder, allow_pickle, anew=True).fingerprint
    except QloraKitError as error:
        if looks_local(base.name):
            return Link("base", "base", base.name, (f"cannot be checked: {error}",))
        return Link("base", "base", base.name, unchecked=str(error))
    same = fingerprint == base.fingerprint
    differs = (
        f"is another one than it was made from: its fingerprint is {fingerprint[:12]}, "
        f"and was {base.fingerprint[:12]}"
    )
    return Link("base", "base", base.name, () if same else (differs,))
