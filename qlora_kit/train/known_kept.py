"""What layers keep for the backward pass: as an earlier start has counted it on the same model,
libraries and machine, or else counted now.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qlora_kit import kept as cache
from qlora_kit.memory.kept import Growth, Kept, measure_kept
from qlora_kit.train.loss_of_length import loss_of_length

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.train.batching import Batching
    from qlora_kit.train.surroundings import Surroundings

_KIND = "kept"


def known_or_counted(
    model: PeftModel, batches: Batching, around: Surroundings, key: str | None
) -> Kept:
    """Of one sequence.

    Args:
        key: of what decides how the model computes, the shortcuts that are taken among it; None
            where nobody can tell, and it is counted.
    """
    if key is None:
        return _counted(model, batches, around)
    how = {"key": key, "collator": type(batches.collator).__name__, "alone": batches.by_example}
    place = cache.key_of(how)
    known = cache.recall(_KIND, place)
    if known is not None:
        return _from_values(known)
    found = _counted(model, batches, around)
    cache.keep(_KIND, place, asdict(found))
    return found


def _counted(model: PeftModel, batches: Batching, around: Surroundings) -> Kept:
    return measure_kept(model, lambda n: loss_of_length(model, batches.collator, n, around))


def _from_values(values: dict[str, Any]) -> Kept:
    return Kept(
        tuple(Growth(**one) for one in values["layers"]),
        Growth(**values["inputs"]),
        Growth(**values["rest"]),
        Growth(**values["passing"]),
    )
