"""Where the merges and exports of a run lie, and which merge serves a new export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.artifact.record import is_artifact, read_record, verify_artifact
from qlora_kit.checkpoint.run_directory import RunDirectory, is_run, open_run
from qlora_kit.errors import AdapterError, ArtifactError, RunError
from qlora_kit.owned import clear_leftovers
from qlora_kit.recipe import MergeSpec

LEDGER_FILE = "ledger.json"
_ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Places:
    """Folders of a run, or of what is made out of an adapter that belongs to none."""

    folder: Path
    exports: Path
    recipe: Path | None

    @property
    def ledger(self) -> Path:
        return self.exports / LEDGER_FILE

    @property
    def merged(self) -> Path:
        return RunDirectory(self.folder).merged

    def merge(self, base: str) -> Path:
        """Where the merge into a base goes: `auto` is the run's own."""
        return self.merged if base == "auto" else self.folder / f"merged-{base}"

    def clear_leftovers(self) -> None:
        """Remove what killed processes have left of merges and exports, of whichever target."""
        clear_leftovers(self.exports)
        ours = (self.exports, self.merged, *map(self.merge, ("original", "dequantized")))
        clear_leftovers(self.folder, *(folder.name for folder in ours))

    def fitting_merge(self, base: str, adapter_sha256: str) -> Path | None:
        """A merge of this very adapter that is there already, and whole: for `auto` the run's own,
        whatever it was merged into.
        """
        known = dict.fromkeys((self.merged, self.merge(base)))
        return next((one for one in known if _fits(one, base, adapter_sha256)), None)

    def require_room_for_merge(self, base: str, adapter_sha256: str) -> None:
        """Raises RunError where a merge would have to be made in a folder that is taken."""
        folder = self.merge(base)
        if folder.exists() and self.fitting_merge(base, adapter_sha256) is None:
            raise RunError(
                f"{folder} is there, but is not a whole merge of this adapter into the base that "
                f"is needed (qlora-kit verify {folder} says more); remove it."
            )


def places_of(folder: Path) -> Places:
    """Of a run, of the adapter in a run, or of an adapter anywhere else.

    Raises:
        RunError: nothing is there. AdapterError: it is none of these.
    """
    if is_run(folder):
        return Places(folder, RunDirectory(folder).exports, folder / "recipe.yaml")
    if folder.name == "adapter" and is_run(folder.parent):
        return places_of(folder.parent)
    _require_adapter(folder)
    home = folder.with_name(f"{folder.name}-exports")
    return Places(home, home, None)


def merge_options_of(folder: Path, **asked: Any) -> MergeSpec:
    """What a run's recipe says of merging (of an adapter alone, the defaults), under what is asked
    for beside it; None is not asked for.

    Raises:
        RunError: nothing is there, or a run that has no adapter yet. AdapterError: it is neither a
            run nor an adapter.
    """
    places_of(folder)
    kept = open_run(folder)[1].export.merge_options if is_run(folder) else MergeSpec()
    named = {name: value for name, value in asked.items() if value is not None}
    return MergeSpec.model_validate({**kept.model_dump(), **named})


def _require_adapter(folder: Path) -> None:
    if not folder.exists():
        raise RunError(f"{folder} does not exist; name the folder of a run or of an adapter.")
    if not (folder / _ADAPTER_FILE).is_file():
        raise AdapterError(
            f"{folder} is neither a run (no recipe.yaml) nor an adapter (no {_ADAPTER_FILE}); name "
            "the folder of one."
        )


def _fits(folder: Path, base: str, adapter_sha256: str) -> bool:
    if not is_artifact(folder):
        return False
    try:
        record = read_record(folder)
    except ArtifactError:
        return False
    adapter = record.made_from.adapter
    of_base = base in ("auto", record.settings.get("base"))
    is_quantized_again = record.settings.get("dtype") in ("nf4", "fp4")
    return (
        record.kind == "merged"
        and of_base
        and not is_quantized_again
        and adapter is not None
        and adapter.sha256 == adapter_sha256
        and not verify_artifact(folder)
    )
