"""An adapter on disk: PEFT's files, its tokenizer, and the manifest that ties it to its base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.errors import AdapterError
from qlora_kit.model.base import Base
from qlora_kit.model.manifest import manifest_for, require_own_base, write_manifest

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.recipe import QuantizationSpec


def save_adapter(
    model: PeftModel,
    base: Base,
    quantization: QuantizationSpec,
    recipe_sha256: str,
    folder: Path,
) -> None:
    """Write the adapter beside its final place, then rename, so that it is whole or not there."""
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    # "auto" would ask the hub whether the vocabulary grew, and offline leave out grown rows.
    model.save_pretrained(scratch, save_embedding_layers=False)
    base.tokenizer.save_pretrained(scratch)
    base.model.generation_config.save_pretrained(scratch)
    readme = scratch / "README.md"
    readme.unlink(missing_ok=True)  # PEFT's is a form to fill in
    write_manifest(manifest_for(base, quantization, recipe_sha256, scratch), scratch)
    scratch.rename(folder)


def load_adapter(
    base: Base, quantization: QuantizationSpec, folder: Path, force: bool = False
) -> tuple[PeftModel, list[str]]:
    """Put a saved adapter on a base that it belongs to; returns what differs under `force`.

    The base's tokenizer must be the adapter's own where tokens were added.

    Raises:
        AdapterError: another base, a damaged file, or no adapter.
    """
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{folder} holds no adapter (no adapter_config.json).")
    differing = require_own_base(folder, base, quantization, force)
    if len(base.tokenizer) > base.model.get_input_embeddings().weight.shape[0]:
        base.model.resize_token_embeddings(len(base.tokenizer), mean_resizing=False)
    try:
        model = PeftModel.from_pretrained(base.model, str(folder), is_trainable=False)
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AdapterError(
            f"{folder} cannot be loaded onto {base.source.name}: {reason}"
        ) from error
    model.eval()
    return model, differing
