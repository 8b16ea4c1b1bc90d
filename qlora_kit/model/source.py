"""From `model.name_or_path` to a local folder, whatever it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_kit.environment import hub_is_offline
from qlora_kit.errors import ModelError
from qlora_kit.model.demo import DEMO_MODEL, demo_model_folder
from qlora_kit.model.gguf import convert_cached

# What a hub snapshot needs: weights, configuration, tokenizer, templates; no other formats.
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")


@dataclass(frozen=True)
class ModelSource:
    """A base model on this machine's disk."""

    name: str
    """What the user called it."""
    folder: Path
    kind: Literal["demo", "folder", "gguf", "hub"]
    revision: str | None = None
    """Commit of a hub snapshot."""


def resolve_source(
    name_or_path: str,
    revision: str | None = None,
    gguf_file: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> ModelSource:
    """Find the model, fetching or converting it where that is needed.

    A local path makes no network call.

    Raises:
        ModelError: it is not there, or cannot be had.
    """
    if name_or_path == DEMO_MODEL:
        return ModelSource(name_or_path, demo_model_folder(), "demo")
    if name_or_path.startswith("demo/"):
        raise ModelError(f"{name_or_path} is not a demo model; there is {DEMO_MODEL}.")
    path = Path(name_or_path).expanduser()
    if gguf_file is not None and path.is_dir():
        path = path / gguf_file
    if path.suffix == ".gguf" and (path.exists() or gguf_file is None):
        if not path.is_file():
            raise ModelError(f"{path} does not exist.")
        return ModelSource(name_or_path, convert_cached(path), "gguf")
    if path.is_dir():
        return ModelSource(name_or_path, path.resolve(), "folder")
    if path.is_file():
        raise ModelError(
            f"{path} is a file; a model is a folder, a .gguf file, or a hub id."
        )
    if looks_local(name_or_path):
        raise ModelError(f"{path} does not exist.")
    if gguf_file is not None:
        return ModelSource(
            name_or_path,
            convert_cached(_hub_file(name_or_path, gguf_file, revision)),
            "gguf",
        )
    patterns = [
        *_PATTERNS,
        *(["*.bin"] if allow_pickle else []),
        *(["*.py"] if trust_remote_code else []),
    ]
    folder = _hub_snapshot(name_or_path, revision, patterns)
    return ModelSource(name_or_path, folder, "hub", folder.name)


def looks_local(name_or_path: str) -> bool:
    """Whether a name can only be a path: hub ids have at most one slash and start with a letter."""
    return name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1


def _hub_snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _HubErrors(name, revision):
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                local_files_only=hub_is_offline(),
            )
        )


def _hub_file(name: str, file_name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    with _HubErrors(name, revision):
        return Path(
            hf_hub_download(
                name, file_name, revision=revision, local_files_only=hub_is_offline()
            )
        )


class _HubErrors:
    """Says what the hub's refusals mean."""

    def __init__(self, name: str, revision: str | None):
        self.name = name if revision is None else f"{name} at revision {revision}"

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> None:
        import httpx
        from huggingface_hub import errors

        if error is None:
            return
        if isinstance(error, errors.GatedRepoError):
            raise ModelError(
                f"{self.name} is gated: accept its licence on its page, then log in with `hf auth login`."
            ) from None
        if isinstance(
            error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError
        ):
            raise ModelError(
                f"the hub has no model {self.name} that you may read."
            ) from None
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(
            error, errors.LocalEntryNotFoundError
        ):
            raise ModelError(f"{self.name}: {error}") from None
        if isinstance(error, errors.HFValidationError):
            raise ModelError(
                f"{self.name} is neither a local path nor a hub id."
            ) from None
        if isinstance(
            error,
            errors.LocalEntryNotFoundError
            | errors.OfflineModeIsEnabled
            | httpx.HTTPError
            | OSError,
        ):
            raise ModelError(
                f"{self.name} is not on this machine, and the hub cannot be reached. Download it "
                "first where there is a network (`hf download`), or name a local folder."
            ) from None
