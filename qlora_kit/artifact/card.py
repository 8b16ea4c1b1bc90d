"""What the README.md of any folder says in the same words: how it is loaded, what else is in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.recipe.yaml import dump_yaml

if TYPE_CHECKING:
    from qlora_kit.recipe.base import Spec

CARD_FILE = "README.md"
RECORDS = (
    "`certificate.json` holds all figures, `artifact.json` what this was made from and the SHA-256 "
    "of every file (`qlora-kit verify` checks them).\n"
)

_LIBRARIES = {"adapter": "peft", "gguf": "gguf", "lora-gguf": "gguf", "ollama": "gguf"}
# Beside transformers.
_NEEDS = {
    "nf4": "bitsandbytes",
    "fp4": "bitsandbytes",
    "llm-int8": "bitsandbytes",
    "gptq": "compressed-tensors",
    "awq": "compressed-tensors",
    "compressed-tensors": "compressed-tensors",
    "int8": "qlora-kit",
}
_TRANSFORMERS = (
    "```python\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
    'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
    "```\n"
)
_ONNX = (
    "```python\nimport onnxruntime\n\n"
    'session = onnxruntime.InferenceSession("path/to/this/folder/model.onnx")\n```\n\n'
    "`qlora-kit chat path/to/this/folder` talks to it.\n"
)


def front_matter(family: str, base_model: str | None, relation: str, tags: Sequence[str]) -> str:
    """What the hub reads. `base_model` is a hub id; None where there is none."""
    of_base = {} if base_model is None else {"base_model": base_model}
    front: dict[str, Any] = {
        **of_base,
        **({"base_model_relation": relation} if of_base else {}),
        "library_name": _LIBRARIES.get(family, "transformers"),
        "pipeline_tag": "text-generation",
        "tags": [*tags, "qlora-kit"],
    }
    return f"---\n{dump_yaml(front)}---\n"


def how_to_load(family: str, gguf_file: str = "") -> str:
    """Commands that load a whole model. family: of the method that made it, or its format."""
    if family == "gguf":
        return f"```bash\nllama-cli -m {gguf_file} -cnv\n```\n"
    if family == "onnx":
        return _ONNX
    if family == "int8":
        code = _TRANSFORMERS.replace("\n", "\nimport qlora_kit.quantize.int8  # registers it\n", 1)
    else:
        code = _TRANSFORMERS
    if family not in _NEEDS:
        return code
    return f"With `transformers` and `{_NEEDS[family]}`:\n\n{code}"


def options_in_words(options: Spec) -> str:
    """A sentence that names, as they are given to `quantize`, those that are not at their default.

    An option that does nothing beside the others is refused unless it has its default, so that
    none of those is named. Nor is a path of this machine.
    """
    paths = {
        name for name in type(options).model_fields if isinstance(getattr(options, name), Path)
    }
    chosen = options.model_dump(mode="json", exclude_defaults=True, exclude=paths)
    if not chosen:
        return ""
    return f" Options: {', '.join(f'`{key}={_yaml(value)}`' for key, value in chosen.items())}."


def _yaml(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
