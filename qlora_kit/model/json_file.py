"""A JSON file that came with a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError


def read_json(path: Path) -> Any:
    """What it holds.

    Raises:
        ModelError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not JSON; fetch it again.") from None
