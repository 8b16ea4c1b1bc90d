"""Which of llmcompressor's warnings mean something to a user, and what.

The others are about its own workings, as the device of a module that has no weights. All of them
are kept in the certificate as they were said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_MEANINGS = (
    (
        r"Hessian inversion failed for (?P<some>\d+)/(?P<all>\d+) modules .*: (?P<names>.*)",
        "{some} of {all} layers were rounded plainly, without gptq: the calibration text does not "
        "determine their inputs; more --calibration-tokens or a larger dampening= may help "
        "({names})",
    ),
    (
        r"(?P<some>\d+) mappings were skipped due to incompatible shapes",
        "not scaled before rounding, as what feeds it is not as wide as its inputs (o_proj, where "
        "heads share their values): {some} times",
    ),
    (
        r"Skipping (?P<name>\S+) for mapping .* no layers are targeted",
        "what {name} feeds is not quantized, so it was not scaled",
    ),
    (
        r"Skipping smooth_layer (?P<name>\S+), NaN or inf",
        "what {name} feeds was rounded without scaling: on the calibration text the model computes "
        "numbers there that are not finite",
    ),
)


def notes_of(warnings: Iterable[str]) -> tuple[str, ...]:
    """Those that mean something, in plain words."""
    notes = []
    for warning in warnings:
        for pattern, meaning in _MEANINGS:
            found = re.match(pattern, warning)
            if found is not None:
                notes.append(meaning.format(**found.groupdict()))
    return tuple(notes)
