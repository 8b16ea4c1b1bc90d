"""What stands beside a model's weights: tokenizer, templates, generation config, code."""

from __future__ import annotations

import shutil
from pathlib import Path

_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
# What says how a folder was made does not hold for what is made of it.
_NOT_COMPANIONS = ("config.json", "certificate.json", "artifact.json")


def copy_companions(folder: Path, out: Path, trust_remote_code: bool = False) -> None:
    """Copy them as they are; where trusted, the model's own Python files too."""
    patterns = (*_COMPANIONS, "*.py") if trust_remote_code else _COMPANIONS
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.name not in _NOT_COMPANIONS and not path.name.endswith(".index.json"):
                shutil.copyfile(path, out / path.name)
