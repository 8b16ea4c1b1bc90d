"""What stands beside the weights of a merged model: config, generation config, tokenizer, code."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from qlora_kit.errors import ModelError
from qlora_kit.model.saved import write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_GENERATION_FILE = "generation_config.json"


def save_config(
    config: PreTrainedConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    num_rows: int | None = None,
    ties: bool | None = None,
) -> None:
    """The base's config with the dtype, vocabulary and ties of what is written; not quantized."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    config.__dict__.pop("quantization_config", None)
    text = config.get_text_config()
    if num_rows is not None:
        text.vocab_size = num_rows
    if ties is not None:
        config.tie_word_embeddings = ties
        text.tie_word_embeddings = ties
    config.save_pretrained(folder)


def save_generation_config(
    source: Path, config: PreTrainedConfig, end: int | None, folder: Path
) -> None:
    """The base's own generation config; it stops at `end`, the tokenizer's end token, too.

    It is copied as it is but for that: transformers refuses to save some that it loads.
    """
    path = source / _GENERATION_FILE
    values = _read(path) if path.is_file() else GenerationConfig.from_model_config(config).to_dict()
    stops = values.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if end is not None and end not in stops:
        stops = [*stops, end]
        values["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    elif not path.is_file():
        return
    text = json.dumps(values, indent=2, sort_keys=True)
    (folder / _GENERATION_FILE).write_text(text + "\n", encoding="utf-8")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Tokenizer and chat template."""
    write_tokenizer(tokenizer, folder)


def copy_code(source: Path, folder: Path) -> None:
    """The model's own Python files, without which its config cannot be loaded."""
    for path in sorted(source.glob("*.py")):
        shutil.copyfile(path, folder / path.name)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} is not a JSON object.")
    return values
