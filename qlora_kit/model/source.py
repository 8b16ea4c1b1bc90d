"""From `model.name_or_path` to a local folder, whatever it names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_kit.environment import hub_is_offline
from qlora_kit.errors import ModelError
from qlora_kit.model.demo import DEMO_MODEL, demo_model_folder
from qlora_kit.model.gguf import convert_cached
from qlora_kit.model.reason import reason_of

if TYPE_CHECKING:
    from qlora_kit.recipe import ModelSpec

# What a hub snapshot needs: weights, configuration, tokenizer, templates; no other formats.
_WEIGHTS = "*.safetensors"
_PATTERNS = ("*.json", _WEIGHTS, "*.model", "*.txt", "*.jinja", "*.tiktoken")
# The same weights once more, for other programs.
_IGNORED = ("consolidated*", "original/*", "onnx/*")


@dataclass(frozen=True)
class ModelSource:
    """A base model on this machine's disk."""

    name: str
    """What the user called it."""
    folder: Path
    kind: Literal["demo", "folder", "gguf", "hub"]
    revision: str | None = None
    """Commit of a hub snapshot."""
    gguf_file: str | None = None
    """The file within what `name` names, where it names several."""

    @property
    def hub_id(self) -> str | None:
        """What the hub knows it by; None of what lies on this machine alone."""
        return None if self.revision is None else self.name


def resolve_source(
    name_or_path: str,
    revision: str | None = None,
    gguf_file: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    with_weights: bool = True,
    local_only: bool = False,
) -> ModelSource:
    """Find the model, fetching or converting it where that is needed.

    A local path makes no network call. Without weights, those of a hub model are not fetched; a
    GGUF file is converted all the same. With `local_only` the hub is not asked at all.

    Raises:
        ModelError: it is not there, or cannot be had.
    """
    if name_or_path == DEMO_MODEL:
        return ModelSource(name_or_path, demo_model_folder(), "demo")
    if name_or_path.startswith("demo/"):
        raise ModelError(f"{name_or_path} is not a demo model; there is {DEMO_MODEL}.")
    path = Path(name_or_path).expanduser()
    if gguf_file is not None and path.is_dir():
        folder = convert_cached(_existing_file(path / gguf_file))
        return ModelSource(name_or_path, folder, "gguf", gguf_file=gguf_file)
    if path.suffix == ".gguf" and gguf_file is None:
        return ModelSource(name_or_path, convert_cached(_existing_file(path)), "gguf")
    if path.is_dir():
        return ModelSource(name_or_path, path.resolve(), "folder")
    if path.is_file():
        raise ModelError(f"{path} is a file; a model is a folder, a .gguf file, or a hub id.")
    if looks_local(name_or_path):
        raise ModelError(f"{path} does not exist.")
    if gguf_file is not None:
        fetched = _hub_file(name_or_path, gguf_file, revision, local_only)
        commit = fetched.parts[-len(Path(gguf_file).parts) - 1]
        return ModelSource(name_or_path, convert_cached(fetched), "gguf", commit, gguf_file)
    patterns = [
        *(one for one in _PATTERNS if with_weights or one != _WEIGHTS),
        *(["*.bin"] if allow_pickle and with_weights else []),
        *(["*.py"] if trust_remote_code else []),
    ]
    folder = _hub_snapshot(name_or_path, revision, patterns, local_only)
    return ModelSource(name_or_path, folder, "hub", folder.name)


def find_source(spec: ModelSpec, with_weights: bool = True) -> ModelSource:
    """What a recipe's section names, as `resolve_source` finds it.

    Raises:
        ModelError: it is not there, or cannot be had.
    """
    return resolve_source(
        spec.name_or_path,
        spec.revision,
        spec.gguf_file,
        spec.allow_pickle,
        spec.trust_remote_code,
        with_weights,
    )


def looks_local(name_or_path: str) -> bool:
    """Whether a name can only be a path: hub ids have at most one slash and start with a letter."""
    return name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1


def _existing_file(path: Path) -> Path:
    if path.is_dir():
        raise ModelError(f"{path} is a folder, and not a GGUF file.")
    if not path.is_file():
        raise ModelError(f"{path} does not exist.")
    return path


def _hub_snapshot(name: str, revision: str | None, patterns: list[str], local_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(name, revision):
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=list(_IGNORED),
                local_files_only=local_only or hub_is_offline(),
            )
        )


def _hub_file(name: str, file_name: str, revision: str | None, local_only: bool) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub_errors(name, revision):
        return Path(
            hf_hub_download(
                name,
                file_name,
                revision=revision,
                local_files_only=local_only or hub_is_offline(),
            )
        )


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Says what the hub's refusals mean."""
    import httpx
    from huggingface_hub import errors

    asked = name if revision is None else f"{name} at revision {revision}"
    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            f"{asked} is gated: accept its licence on its page, then log in with `hf auth login`."
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise ModelError(f"the hub has no model {asked} that you may read.") from None
    except errors.HFValidationError:
        raise ModelError(f"{asked} is neither a local path nor a hub id.") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.HTTPError):
        raise ModelError(
            f"{asked} is not on this machine, and the hub cannot be reached. Download it first "
            "where there is a network (`hf download`), or name a local folder."
        ) from None
    except errors.EntryNotFoundError as error:
        raise ModelError(f"{asked}: {reason_of(error)}") from None
    except OSError as error:
        raise ModelError(f"{asked} cannot be fetched: {reason_of(error)}") from None
