"""Ollama's Modelfile for a GGUF file. https://docs.ollama.com/modelfile"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.quantize.gguf.ollama.translate import Translated, ends_of, to_ollama

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
# What Ollama takes of a generation_config.json, under its own names.
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
_MOST_CONTEXT = 8192


def write_modelfile(
    folder: Path,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adds_bos: bool,
    context_tokens: int | None,
    adapter: str | None = None,
    parameters: Mapping[str, float | int] | None = None,
) -> Translated:
    """Write `Modelfile` into a folder, for the GGUF file `model` in it.

    Args:
        adds_bos: whether that file asks for the begin token (`LoadedModel.adds_bos`).
        adapter: a GGUF adapter in the folder, to run beside the model.
        parameters: Ollama's, in place of those of the folder's generation_config.json.

    Raises:
        ModelError: Ollama cannot express the chat template; says why.
    """
    translated = to_ollama(tokenizer, adds_bos)
    chosen = dict(sampling_of(folder) if parameters is None else parameters)
    if context_tokens and "num_ctx" not in chosen:
        chosen["num_ctx"] = min(context_tokens, _MOST_CONTEXT)
    lines = [f"FROM ./{model}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    lines.append(f'TEMPLATE """{translated.template}"""')
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends_of(tokenizer)]
    lines += [f"PARAMETER {name} {value}" for name, value in chosen.items()]
    lines += [f"# {note}." for note in translated.notes]
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return translated


def sampling_of(folder: Path) -> dict[str, Any]:
    """How the model's makers sample; greedy, as it was measured, where they say nothing."""
    path = folder / "generation_config.json"
    stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not stated.get("do_sample"):
        return {"temperature": 0}
    return {name: stated[key] for key, name in _SAMPLING.items() if stated.get(key) is not None}
