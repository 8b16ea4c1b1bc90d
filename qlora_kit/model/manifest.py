"""What an adapter must know about its base, kept beside PEFT's files.

PEFT's own adapter_config.json names a base but says nothing of its weights or of how they were
quantized, and an adapter loads onto any base of the same shapes without a word.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import qlora_kit
from qlora_kit.environment import package_versions
from qlora_kit.errors import AdapterError
from qlora_kit.model.base import Base, quantization_record
from qlora_kit.model.tokenizer import template_hash, tokenizer_hash
from qlora_kit.recipe import QuantizationSpec

MANIFEST_FILE = "qlora_kit.json"
_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Everything that has to match for an adapter to mean what it meant in training."""

    base_name: str
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
    format: int = _FORMAT


def manifest_for(
    base: Base, quantization: QuantizationSpec, recipe_sha256: str, folder: Path
) -> Manifest:
    """Describe a saved adapter folder; its files must be in place."""
    return Manifest(
        base_name=base.source.name,
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
    )


def write_manifest(manifest: Manifest, folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text(json.dumps(asdict(manifest), indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Raises AdapterError where it is missing or cannot be read."""
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in fields(Manifest)}
        return Manifest(
            **{name: value for name, value in values.items() if name in names}
        )
    except FileNotFoundError:
        raise AdapterError(
            f"{folder} has no {MANIFEST_FILE}, so nobody knows which base this adapter belongs to."
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None


def differences(
    manifest: Manifest, base: Base, quantization: QuantizationSpec
) -> list[str]:
    """What of `base` is not what the adapter was trained on, in words."""
    found = []
    if manifest.base_fingerprint != base.fingerprint:
        found.append(
            f"the weights: trained on {manifest.base_name} ({manifest.base_fingerprint[:12]}), "
            f"this is {base.source.name} ({base.fingerprint[:12]})"
        )
    now = quantization_record(quantization, base.compute_dtype)
    for key in (
        "load_in_4bit",
        "load_in_8bit",
        "quant_type",
        "double_quant",
        "skip_modules",
    ):
        if manifest.quantization.get(key) != now[key]:
            found.append(
                f"quantization.{key}: trained with {manifest.quantization.get(key)}, now {now[key]}"
            )
    return found


def require_own_base(
    folder: Path, base: Base, quantization: QuantizationSpec, force: bool = False
) -> list[str]:
    """Refuse an adapter that belongs to another base; with `force`, return what differs.

    Raises:
        AdapterError: says what differs.
    """
    manifest = read_manifest(folder)
    damaged = [
        name
        for name, digest in manifest.files.items()
        if not (folder / name).is_file() or file_sha256(folder / name) != digest
    ]
    found = [
        f"the file {name}: missing or changed since it was saved" for name in damaged
    ]
    found += differences(manifest, base, quantization)
    if found and not force:
        listed = "\n".join(f"  - {one}" for one in found)
        raise AdapterError(
            f"{folder} does not belong to this base:\n{listed}\nUse --force to load it all the same."
        )
    return found


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
