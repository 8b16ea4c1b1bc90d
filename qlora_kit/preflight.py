"""What a recipe names, looked up on this machine before any work is done. No torch.

A hub id cannot be checked without a network; whatever is local can: its existence, whether a
model folder is whole, whether a weight file was cut off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from qlora_kit.data.demo import NUM_ROWS
from qlora_kit.data.read import source_files
from qlora_kit.errors import DataError, Fault, ModelError, QloraKitError, RecipeError
from qlora_kit.export.targets import parse_target, require_installed
from qlora_kit.extras import fault_of
from qlora_kit.model.weights import inspect_weights
from qlora_kit.recipe import (
    ModelSpec,
    Recipe,
    SourceSpec,
    load_recipe,
    load_whole_sections,
)
from qlora_kit.templates import library

AnySpec = TypeVar("AnySpec", ModelSpec, SourceSpec)

DEMO_PREFIX = "demo/"
DEMO_MODELS = ("demo/smollm2-135m-instruct",)
DEMO_DATA = ("demo/commands",)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)

_GGUF_MAGIC = b"GGUF"
_PEEK_BYTES = 65536


def load_checked(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe that is right by itself and names only what is there.

    Raises:
        RecipeError: holds every fault of both kinds; of a section that is itself at fault, it is
            not looked up what it names.
    """
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as error:
        partly, sections = load_whole_sections(path, overrides)
        told = tuple(f"{fault.path}." for fault in error.faults)
        more = [
            one
            for one in preflight(partly)
            if one.path.partition(".")[0] in sections and not f"{one.path}.".startswith(told)
        ]
        raise RecipeError(error.source, [*error.faults, *more]) from None
    if faults := preflight(recipe):
        raise RecipeError(str(path), faults)
    return recipe


def preflight(recipe: Recipe) -> list[Fault]:
    """Every fault in what the recipe names; relative paths start in the working directory."""
    faults = _guarded("model.name_or_path", _base_faults, recipe.model)
    faults += [*data_faults(recipe), *_tracker_faults(recipe)]
    return [*faults, *_export_faults(recipe), *_aware_faults(recipe)]


def data_faults(recipe: Recipe) -> list[Fault]:
    """Those that concern the data and how they become tokens, and not the base model."""
    faults = _guarded("model.tokenizer_name_or_path", _tokenizer_faults, recipe.model)
    faults += _guarded("model.chat_template", _template_faults, recipe.model)
    for part in ("train", "eval"):
        for number, source in enumerate(getattr(recipe.data, part)):
            faults += _guarded(f"data.{part}.{number}", _source_faults, source)
    return faults


def _export_faults(recipe: Recipe) -> list[Fault]:
    """Targets that are none, or that something is missing for."""
    faults = []
    for number, name in enumerate(recipe.export.to):
        try:
            require_installed(parse_target(name))
        except QloraKitError as error:
            faults.append(Fault(f"export.to.{number}", str(error).rstrip(".")))
    return faults


def _tracker_faults(recipe: Recipe) -> list[Fault]:
    return [
        Fault(
            "train.report_to",
            f"{tracker} is not installed",
            f"pip install 'qlora-kit[{tracker}]'",
        )
        for tracker in recipe.train.report_to
        if find_spec(tracker) is None
    ]


def _aware_faults(recipe: Recipe) -> list[Fault]:
    """What stores the integers of a training that is aware of them."""
    aware = recipe.quantization_aware
    if aware is None or aware.method == "nf4" or (fault := fault_of("qat")) is None:
        return []
    message = f"what is stored in {aware.method} needs {fault}"
    return [Fault("quantization_aware.method", message, "pip install 'qlora-kit[qat]'")]


def looks_local(name: str) -> bool:
    """Whether a model's name can only be a path; a hub id is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _guarded(key: str, check: Callable[[str, AnySpec], list[Fault]], spec: AnySpec) -> list[Fault]:
    """A path that the system refuses to look at (too long, forbidden) is a fault as well."""
    try:
        return check(key, spec)
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return [Fault(key, f"cannot be looked up: {reason}")]


def _base_faults(key: str, spec: ModelSpec) -> list[Fault]:
    name = spec.name_or_path
    if name.startswith(DEMO_PREFIX):
        return _demo_faults(key, name, DEMO_MODELS)
    path = Path(name).expanduser()
    if path.is_dir():
        if spec.revision is not None:
            hint = "remove it, or name the hub id"
            return [Fault("model.revision", f"{name} is a folder, which has no revisions", hint)]
        if spec.gguf_file is not None:
            return _gguf_faults("model.gguf_file", path / spec.gguf_file)
        return _folder_faults(key, path, spec)
    if path.suffix == ".gguf":
        return _gguf_faults(key, path)
    if path.exists():
        return [Fault(key, f"{path} is a file", "name a folder, a .gguf file or a hub id")]
    if looks_local(name):
        return [Fault(key, f"there is no folder {path}", _working_directory(path))]
    return []


def _folder_faults(key: str, folder: Path, spec: ModelSpec) -> list[Fault]:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            hint = "name the base model that it was trained on"
            return [Fault(key, f"{folder} holds an adapter, not a model", hint)]
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"set model.gguf_file: {ggufs[0]}" if ggufs else "name a model's own folder"
        return [Fault(key, f"{folder} has no config.json, so it is not a model folder", hint)]
    faults = []
    if not _is_json_mapping(folder / "config.json"):
        faults.append(Fault(key, f"{folder / 'config.json'} is not JSON", "fetch it again"))
    try:
        weights = inspect_weights(folder)
        if weights.format == "pickle" and not spec.allow_pickle:
            message = (
                f"{folder} holds its weights as pickles ({weights.files[0].name}), which can run "
                "code when they are read"
            )
            hint = "convert them to safetensors, or set model.allow_pickle: true"
            faults.append(Fault(key, message, hint))
    except ModelError as error:
        faults.append(Fault(key, str(error).rstrip(".")))
    if spec.tokenizer_name_or_path is None and not _has_tokenizer(folder):
        hint = "set model.tokenizer_name_or_path"
        faults.append(Fault(key, f"{folder} has no tokenizer (no tokenizer.json)", hint))
    return faults


def _template_faults(key: str, spec: ModelSpec) -> list[Fault]:
    if spec.chat_template is None:
        return []
    if spec.chat_template in library():
        return []
    message = _file_problem(Path(spec.chat_template).expanduser())
    hint = f"name a Jinja file, or one of {', '.join(library())}"
    return [Fault(key, message, hint)] if message else []


def _tokenizer_faults(key: str, spec: ModelSpec) -> list[Fault]:
    name = spec.tokenizer_name_or_path
    if name is None:
        return []
    if name.startswith(DEMO_PREFIX):
        return _demo_faults(key, name, DEMO_MODELS)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return _gguf_faults(key, path)
    if path.is_dir():
        if _has_tokenizer(path):
            return []
        return [Fault(key, f"{path} has no tokenizer (no tokenizer.json)")]
    if path.exists():
        return [Fault(key, f"{path} is a file", "name the folder that it is in")]
    if looks_local(name):
        return [Fault(key, f"there is no folder {path}", _working_directory(path))]
    return []


def _source_faults(key: str, source: SourceSpec) -> list[Fault]:
    if source.path.startswith(DEMO_PREFIX):
        faults = _demo_faults(f"{key}.path", source.path, DEMO_DATA)
        if not faults and source.split not in NUM_ROWS:
            message = f"{source.path} has no split '{source.split}'"
            faults.append(Fault(f"{key}.split", message, f"it has {', '.join(NUM_ROWS)}"))
        return faults
    try:
        source_files(source)
    except DataError as error:
        return [Fault(f"{key}.path", str(error).rstrip("."))]
    return []


def _demo_faults(key: str, name: str, known: tuple[str, ...]) -> list[Fault]:
    if name in known:
        return []
    return [Fault(key, f"there is no {name} in the kit", f"there is {', '.join(known)}")]


def _gguf_faults(key: str, path: Path) -> list[Fault]:
    message = _file_problem(path)
    if message:
        return [Fault(key, message)]
    with path.open("rb") as file:
        magic = file.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        return [Fault(key, f"{path} is not a GGUF file: it starts with {magic!r}")]
    return []


def _file_problem(path: Path) -> str:
    """Why a file cannot be used; empty when it can."""
    if path.is_dir():
        return f"{path} is a folder"
    try:
        with path.open("rb") as file:
            start = file.read(_PEEK_BYTES)
    except FileNotFoundError:
        return f"there is no file {path}"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    is_whole = len(start) < _PEEK_BYTES
    return f"{path} is empty" if is_whole and not start.strip() else ""


def _has_tokenizer(folder: Path) -> bool:
    has_tiktoken = any(folder.glob("*.tiktoken"))
    return has_tiktoken or any((folder / name).is_file() for name in TOKENIZER_FILES)


def _is_json_mapping(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _working_directory(path: Path) -> str:
    return "" if path.is_absolute() else f"relative paths start in {Path.cwd()}"
