"""Rows of a data set on the hub, and of the built-in demo."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from qlora_kit.data.demo import demo_rows
from qlora_kit.data.read.strict_json import Refusal
from qlora_kit.data.rows import BadRow, Row
from qlora_kit.errors import DataError
from qlora_kit.recipe.data import SourceSpec

DEMO_PREFIX = "demo/"


def demo_source(spec: SourceSpec) -> Iterator[Row]:
    """Rows of a built-in data set, counted from 1."""
    for number, record in enumerate(demo_rows(_demo_name(spec), spec.split), start=1):
        yield Row(spec.path, number, record)


def hub_source(spec: SourceSpec, *, streaming: bool) -> Iterator[Row | BadRow]:
    """Rows of a data set on the hub, counted from 1.

    Raises:
        DataError: the hub does not give it, or stops giving it.
    """
    from qlora_kit.data.read.columnar import plain_record

    rows = iter(_loaded(spec, streaming=streaming))
    number = 0
    while True:
        number += 1
        try:
            record = next(rows, None)
        except upstream_faults() as error:
            raise DataError(
                f"{spec.path} (split {spec.split}) broke off behind row {number - 1}: "
                f"{_first_line(error)}"
            ) from error
        if record is None:
            return
        try:
            yield Row(spec.path, number, plain_record(dict(record)))
        except Refusal as refusal:
            yield BadRow(spec.path, number, refusal.reason, refusal.detail)


def remote_fingerprint(spec: SourceSpec) -> str:
    """What stands for the bytes of a hub or demo source."""
    if spec.path.startswith(DEMO_PREFIX):
        rows = json.dumps(demo_rows(_demo_name(spec), spec.split))
        return hashlib.sha256(rows.encode()).hexdigest()
    return str(_loaded(spec, streaming=False)._fingerprint)


def _demo_name(spec: SourceSpec) -> str:
    return spec.path.removeprefix(DEMO_PREFIX)


def _loaded(spec: SourceSpec, *, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(spec.path, spec.config, split=spec.split, streaming=streaming)
    except upstream_faults() as error:
        part = f"split '{spec.split}'" + (f" of '{spec.config}'" if spec.config else "")
        away = ". Name a local file, or download it where there is a network."
        raise DataError(
            f"{spec.path} is no local file, and the hub did not give its {part}: "
            f"{_first_line(error)}{away if isinstance(error, ConnectionError) else ''}"
        ) from error


def upstream_faults() -> tuple[type[Exception], ...]:
    """Everything that loading from the hub raises over what is there, or is not reachable."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    return (DatasetsError, HfHubHTTPError, OSError, ValueError, KeyError, RuntimeError)


def _first_line(error: Exception) -> str:
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
