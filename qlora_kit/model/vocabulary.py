"""What of a base model decides how text becomes tokens. Its weights are not read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.errors import ModelError
from qlora_kit.model.skeleton import load_config
from qlora_kit.model.source import ModelSource, find_source, resolve_source
from qlora_kit.model.tokenizer import (
    PadChoice,
    ensure_padding,
    load_tokenizer,
    set_template_values,
    stop_ids_of,
)

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

    from qlora_kit.recipe import ModelSpec


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer as training has it, and the tokens at which generation stops."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    pad: PadChoice
    source: ModelSource


def load_vocabulary(spec: ModelSpec) -> Vocabulary:
    """As `load_base` has them, so that what is rendered with one serves the other.

    Raises:
        ModelError: the model is not there, or has no tokenizer that can be used.
    """
    source = find_source(spec, with_weights=False)
    config = load_config(source.folder, spec.trust_remote_code)
    folder = source.folder
    if spec.tokenizer_name_or_path is not None:
        folder = resolve_source(spec.tokenizer_name_or_path, with_weights=False).folder
    tokenizer = load_tokenizer(folder, spec.chat_template, spec.trust_remote_code)
    set_template_values(tokenizer, spec.chat_template_kwargs)
    num_embeddings: int | None = getattr(config.get_text_config(), "vocab_size", None)
    if num_embeddings is not None and len(tokenizer) > num_embeddings:
        raise ModelError(
            f"the tokenizer knows {len(tokenizer)} tokens, but the model embeds only "
            f"{num_embeddings}: they do not belong together. Name the model's own with "
            "model.tokenizer_name_or_path."
        )
    pad = ensure_padding(tokenizer, num_embeddings)
    stops = stop_ids_of(_generation_config(source.folder, config), tokenizer)
    return Vocabulary(tokenizer, stops, pad, source)


def _generation_config(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """That of the folder; else what the model's own configuration says of generation."""
    from transformers import GenerationConfig

    try:
        stored = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        return GenerationConfig.from_model_config(config)
    assert isinstance(stored, GenerationConfig)
    return stored
