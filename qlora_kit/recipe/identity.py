"""The hash that tells whether two recipes ask for the same.

It is over what a recipe says beyond the defaults, so that a version with more fields gives a
recipe of an older one the same hash: each new field is at its default there. That default must
therefore be what older versions did.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_kit.recipe.base import Spec

if TYPE_CHECKING:
    from qlora_kit.recipe.recipe import Recipe

# Field (data.train.path, without numbers of list entries) → the default that it was introduced
# with, once that has changed. The hash goes on leaving out this first default, and no other:
#  - A run of before has the old value spelled out in its recipe.yaml, or lacks a field that came
#    later, which `load_written_out` reads as this; it keeps its hash.
#  - A recipe that leaves the field to the default asks for something else than it did before the
#    change. It gets another hash, and a run that it goes on with is refused or told the change
#    (`checkpoint/drift.py`), as if the user had made it.
FIRST_DEFAULTS: Mapping[str, Any] = {
    "train.gradient_checkpointing": True,
    "train.optim": "paged_adamw_8bit",
    "quantization.upcast_norms": True,
}


def recipe_hash(recipe: Recipe, first_defaults: Mapping[str, Any] = FIRST_DEFAULTS) -> str:
    """SHA-256 over all that shapes the result: the recipe less its defaults and the place it runs
    in.
    """
    values = _beyond_defaults(recipe, "", first_defaults)
    values.pop("run_dir", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def every_field_hash(recipe: Recipe) -> str:
    """What stood in records until 2026-11-28: over defaults as well."""
    values = recipe.model_dump(mode="json", exclude={"run_dir"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _beyond_defaults(spec: Spec, path: str, first_defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A section that is always there is left out where all of it is; one that may lack is not."""
    kept = {}
    written, values = spec.model_dump(mode="json"), dict(spec)
    for name, field in type(spec).model_fields.items():
        value, below = values[name], f"{path}.{name}" if path else name
        default = field.get_default(call_default_factory=True, validated_data=values)
        if isinstance(value, Spec) and isinstance(default, Spec):
            inner = _beyond_defaults(value, below, first_defaults)
            if inner:
                kept[name] = inner
        elif value != first_defaults.get(below, default):
            kept[name] = _plain(value, written[name], below, first_defaults)
    return kept


def _plain(value: Any, written: Any, path: str, first_defaults: Mapping[str, Any]) -> Any:
    if isinstance(value, Spec):
        return _beyond_defaults(value, path, first_defaults)
    if isinstance(value, tuple):
        pairs = zip(value, written, strict=True)
        return [_plain(one, plain, path, first_defaults) for one, plain in pairs]
    return written
