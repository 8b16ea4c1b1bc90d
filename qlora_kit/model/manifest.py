"""What an adapter must know about its base, kept beside PEFT's files.

PEFT's own adapter_config.json names a base but says nothing of its weights or of how they were
quantized, and an adapter loads onto any base of the same shapes without a word.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import qlora_kit
from qlora_kit.errors import AdapterError
from qlora_kit.model.base import Base, quantization_record
from qlora_kit.model.configured import changed_settings
from qlora_kit.model.source import ModelSource
from qlora_kit.model.tokenizer import template_hash, tokenizer_hash
from qlora_kit.recipe import ModelSpec, QuantizationSpec
from qlora_kit.records import file_sha256
from qlora_kit.versions import package_versions

MANIFEST_FILE = "qlora_kit.json"
_FORMAT = 1

# What of the quantization decides the numbers that the adapter was trained on.
_DECISIVE = (
    "load_in_4bit",
    "load_in_8bit",
    "quant_type",
    "double_quant",
    "skip_modules",
    "int8_threshold",
    "overrides",
)
# What a manifest that was written before there was such a key stands for.
_BEFORE: dict[str, Any] = {"overrides": {}, "upcast_norms": True}
# Packages whose arithmetic an adapter has learned with.
_NUMERIC_PACKAGES = ("torch", "transformers", "bitsandbytes", "peft")


@dataclass(frozen=True)
class Manifest:
    """Everything that has to match for an adapter to mean what it meant in training."""

    base_name: str
    """A hub id, a built-in model, or an absolute path."""
    base_revision: str | None
    base_fingerprint: str
    quantization: dict[str, Any]
    tokenizer_sha256: str
    chat_template_sha256: str | None
    recipe_sha256: str
    versions: dict[str, str | None]
    qlora_kit_version: str
    files: dict[str, str]
    """File → SHA-256."""
    base_gguf_file: str | None = None
    """Where `base_name` holds several GGUF files, the one that was taken."""
    quantization_aware: dict[str, Any] | None = None
    """How the merged weights were quantized in training, where they were."""
    base_config: str | None = None
    """What the base's config.json held, as JSON; empty where this program has written that. None in
    manifests of earlier versions.
    """
    format: int = _FORMAT


def manifest_for(
    base: Base,
    quantization: QuantizationSpec,
    recipe_sha256: str,
    folder: Path,
    quantization_aware: dict[str, Any] | None = None,
) -> Manifest:
    """Describe a saved adapter folder; its files must be in place."""
    return Manifest(
        base_name=lasting_name(base.source),
        base_revision=base.source.revision,
        base_fingerprint=base.fingerprint,
        quantization=quantization_record(quantization, base.compute_dtype),
        tokenizer_sha256=tokenizer_hash(base.tokenizer),
        chat_template_sha256=template_hash(base.tokenizer),
        recipe_sha256=recipe_sha256,
        versions=package_versions(),
        qlora_kit_version=qlora_kit.__version__,
        files={
            path.name: file_sha256(path)
            for path in sorted(folder.iterdir())
            if path.is_file() and path.name != MANIFEST_FILE
        },
        base_gguf_file=base.source.gguf_file,
        quantization_aware=quantization_aware,
        base_config=base.configured,
    )


def lasting_name(source: ModelSource) -> str:
    """A name that means the same from another working directory."""
    path = Path(source.name).expanduser()
    if source.kind in ("folder", "gguf") and path.exists():
        return str(path.resolve())
    return source.name


def write_manifest(manifest: Manifest, folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text(manifest_text(manifest), encoding="utf-8")


def manifest_text(manifest: Manifest) -> str:
    return json.dumps(asdict(manifest), indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Raises AdapterError where it is missing or cannot be read."""
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{folder} has no {MANIFEST_FILE}, so nobody knows which base this adapter belongs to."
        ) from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise AdapterError(f"{path} is not JSON; the adapter is damaged.") from None
    return _manifest(path, values)


def _manifest(path: Path, values: object) -> Manifest:
    """Raises AdapterError where a value is missing or of another type than was written."""
    if not isinstance(values, dict):
        raise AdapterError(f"{path} is no manifest: it holds a {type(values).__name__}.")
    known = {field.name for field in fields(Manifest)}
    if isinstance(values.get("format"), int) and values["format"] > _FORMAT:
        raise AdapterError(
            f"{path} was written by a newer qlora-kit ({values.get('qlora_kit_version')}); "
            "this one cannot read it."
        )
    texts = (
        "base_name",
        "base_fingerprint",
        "tokenizer_sha256",
        "recipe_sha256",
        "qlora_kit_version",
    )
    wrong = [name for name in texts if not isinstance(values.get(name), str)]
    wrong += ["format"] if type(values.get("format")) is not int else []
    wrong += [
        name
        for name in ("base_revision", "chat_template_sha256", "base_gguf_file", "base_config")
        if not isinstance(values.get(name), str | None)
    ]
    wrong += [
        name
        for name in ("quantization", "versions", "files")
        if not isinstance(values.get(name), dict)
    ]
    if not isinstance(values.get("quantization_aware"), dict | None):
        wrong += ["quantization_aware"]
    if wrong:
        raise AdapterError(f"{path} is damaged: {', '.join(wrong)} is missing or no such thing.")
    for name, digest in values["files"].items():
        if Path(name).name != name or not isinstance(digest, str):
            raise AdapterError(f"{path} is damaged: files holds {name!r}.")
    try:
        return Manifest(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise AdapterError(f"{path} is damaged: {error}.") from None


def base_of(manifest: Manifest, read_as: ModelSpec) -> ModelSpec:
    """Where an adapter's base is. Whether its code or pickles may be read is for the user to say
    in `read_as`, not for the adapter.
    """
    return ModelSpec(
        name_or_path=manifest.base_name,
        revision=manifest.base_revision,
        gguf_file=manifest.base_gguf_file,
        trust_remote_code=read_as.trust_remote_code,
        allow_pickle=read_as.allow_pickle,
    )


def stored_settings(manifest: Manifest, folder: Path) -> QuantizationSpec:
    """The quantization that the adapter was trained on.

    Raises:
        AdapterError: what the manifest says is no quantization.
    """
    stored = {**_BEFORE, **manifest.quantization}
    settings = {key: value for key, value in stored.items() if key in _SPEC_KEYS}
    try:
        return QuantizationSpec.model_validate(settings)
    except ValueError as error:
        raise AdapterError(
            f"{folder / MANIFEST_FILE} is damaged: its quantization is none ({error})."
        ) from None


def computed_as(
    manifest: Manifest, quantization: QuantizationSpec, folder: Path
) -> QuantizationSpec:
    """These settings, computed in what the adapter was trained in."""
    stored = stored_settings(manifest, folder)
    how = {name: getattr(stored, name) for name in ("compute_dtype", "upcast_norms")}
    return quantization.model_copy(update=how)


_SPEC_KEYS = frozenset(QuantizationSpec.model_fields)


def differences(manifest: Manifest, base: Base, quantization: QuantizationSpec) -> list[str]:
    """What of `base` is not what the adapter was trained on, in words."""
    found = []
    if manifest.base_fingerprint != base.fingerprint:
        found.append(
            f"the weights: trained on {manifest.base_name} ({manifest.base_fingerprint[:12]}), "
            f"this is {base.source.name} ({base.fingerprint[:12]})"
        )
    if manifest.base_config and base.configured not in ("", manifest.base_config):
        changed = changed_settings(manifest.base_config, base.configured)
        found.append(f"its config.json, by which it computes otherwise{changed and f': {changed}'}")
    now = quantization_record(quantization, base.compute_dtype)
    for key in _DECISIVE:
        was = manifest.quantization.get(key, _BEFORE.get(key))
        if was != now[key]:
            found.append(f"quantization.{key}: trained with {was}, now {now[key]}")
    if manifest.tokenizer_sha256 != tokenizer_hash(base.tokenizer):
        found.append("the tokenizer: it makes other ids of a text than the one trained with")
    if manifest.chat_template_sha256 != template_hash(base.tokenizer):
        found.append("the chat template: another one than trained with")
    return found


def changed_circumstances(manifest: Manifest, base: Base) -> list[str]:
    """What differs without making it another base: precision and versions, in words."""
    found = []
    dtype = str(base.compute_dtype).removeprefix("torch.")
    was = manifest.quantization.get("compute_dtype")
    if was != dtype:
        found.append(f"trained in {was}, now computing in {dtype}")
    now = package_versions()
    found += [
        f"trained with {name} {manifest.versions.get(name)}, this is {now[name]}"
        for name in _NUMERIC_PACKAGES
        if manifest.versions.get(name) != now[name]
    ]
    return found


def require_own_base(
    folder: Path, base: Base, quantization: QuantizationSpec, force: bool = False
) -> list[str]:
    """Refuse an adapter that belongs to another base; with `force`, return what differs.

    Raises:
        AdapterError: says what differs.
    """
    if force and not (folder / MANIFEST_FILE).is_file():
        return [f"{folder} has no {MANIFEST_FILE}, so nothing of its base is known"]
    manifest = read_manifest(folder)
    damaged = [
        name
        for name, digest in manifest.files.items()
        if not (folder / name).is_file() or file_sha256(folder / name) != digest
    ]
    found = [f"the file {name}: missing or changed since it was saved" for name in damaged]
    found += differences(manifest, base, quantization)
    if found and not force:
        listed = "\n".join(f"  - {one}" for one in found)
        raise AdapterError(
            f"{folder} does not belong to this base:\n{listed}\n"
            "Use --force to load it all the same."
        )
    return found
