"""Least squares of time and memory, and each shape held against a fit that was made without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from plan_bench.cases import Case

from scaling_bench.shapes import value_of
from scaling_bench.terms import HOLD_NAMES, TERM_NAMES, Holds, Terms

MOST_OFF, MOST_OFF_IN_MEMORY = 0.25, 0.1
_MIB = 2**20


def tell_fit(shapes: Sequence[dict[str, Any]]) -> list[str]:
    """Print the fitted rates, and how each shape stands to a fit without it; returns those off."""
    cases = [Case(**one["case"]) for one in shapes]
    terms = np.array([Terms.of(one).as_row() for one in cases])
    seconds = np.array([min(one["cpu_seconds"]) for one in shapes])
    if len(cases) <= terms.shape[1] + 1:
        print("too few shapes for a fit")
        return []
    rates = fitted(terms, seconds)
    print("\nfit, seconds for 10⁹ of each (operations, numbers, parameters), and for an update:")
    for name, rate in zip(TERM_NAMES, rates, strict=True):
        print(f"  {name:12} {rate:.4g}" + (f"  {1 / rate:,.1f} 10⁹/s" if rate > 0 else ""))
    return without_each(shapes, terms, seconds, "s", MOST_OFF)


def tell_memory_fit(shapes: Sequence[dict[str, Any]]) -> list[str]:
    """The same of the memory of the process."""
    holds = np.array([Holds.of(Case(**one["case"])).as_row() for one in shapes])
    peaks = np.array([max(one["process"]) / _MIB for one in shapes])
    if len(shapes) <= holds.shape[1] + 1:
        return []
    shares = fitted(holds, peaks)
    print("\nfit, MiB of the process for each that is counted, and for the process itself:")
    for name, share in zip(HOLD_NAMES, shares, strict=True):
        print(f"  {name:12} {share:.4g}")
    return without_each(shapes, holds, peaks, "MiB", MOST_OFF_IN_MEMORY)


def without_each(
    shapes: Sequence[dict[str, Any]],
    terms: np.ndarray,
    values: np.ndarray,
    unit: str,
    most_off: float,
) -> list[str]:
    """Print how each shape stands to a fit that was made without it; returns those that are off."""
    off = []
    print("each shape by a fit without it:")
    for number, row in enumerate(shapes):
        rest = np.arange(len(shapes)) != number
        told = float(terms[number] @ fitted(terms[rest], values[rest]))
        ratio = told / values[number]
        name = f"{row['sweeps'][0]} {value_of(row['sweeps'][0], row['case'])}"
        is_off = bool(abs(ratio - 1) > most_off)
        off += [name] * is_off
        print(
            f"  {name:20} {told:10,.2f} of {values[number]:10,.2f} {unit}  {ratio:.2f}"
            + "  OFF" * is_off
        )
    return off


def fitted(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative least squares of relative errors, by Lawson and Hanson's method."""
    from scipy.optimize import nnls

    rates: np.ndarray = nnls(terms / seconds[:, None], np.ones(len(seconds)))[0]
    return rates
