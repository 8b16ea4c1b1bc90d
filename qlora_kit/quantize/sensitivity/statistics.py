"""What the weights of a layer say of how well it can be quantized, before anything is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from qlora_kit.quantize.rounding import Rounding

# A column (what one input feature is multiplied by) this many times the median one is an outlier.
_OUTLIER_RATIO = 4.0
# A row's error counts as damage where double quantization makes it this many times what it was.
_DAMAGE_RATIO = 1.2
_SATURATED_SHARE = 1e-3


@dataclass(frozen=True)
class LayerStatistics:
    """Of one weight, (out, in). Errors are |ΔW| / |W| of a row, in the Frobenius norm."""

    name: str
    num_out: int
    num_in: int
    absmax: float
    kurtosis: float
    """Excess kurtosis: 0 for a normal distribution; heavy tails are far above."""
    num_outlier_columns: int
    """Columns whose norm is at least four times the median column's."""
    saturation: float
    """Share of the weights at the very largest magnitude: one alone unless something clipped them
    before, or a 16-bit type overflowed."""
    num_non_finite: int
    error: float
    """Median over the rows."""
    num_damaged_rows: int
    """Rows whose error double quantization raises by a fifth or more: they share scales with an
    outlier."""
    damaged_error: tuple[float, float] | None
    """Without and with double quantization, in the row that it harms most."""

    def findings(self) -> Iterator[str]:
        """What a person should know, in words."""
        if self.num_non_finite:
            numbers = (
                "a number that is"
                if self.num_non_finite == 1
                else f"{self.num_non_finite:,} numbers that are"
            )
            yield f"{self.name} holds {numbers} NaN or infinite."
        if self.damaged_error is not None:
            single, double = self.damaged_error
            yield (
                f"{self.name}: double quantization spreads an outlier (largest weight "
                f"{self.absmax:.3g}) over {self.num_damaged_rows} of {self.num_out} rows, whose "
                f"error goes from {single:.3f} to {double:.3f}; keep the layer in 8 or 16 bits "
                "(quantization.overrides), or set double_quant: false."
            )
        if self.saturation > _SATURATED_SHARE:
            yield (
                f"{self.name}: {self.saturation:.2%} of the weights are at the largest magnitude "
                f"({self.absmax:.3g}), so something has clipped them before."
            )


def layer_statistics(name: str, weight: torch.Tensor, rounding: Rounding) -> LayerStatistics:
    """weight: (out, in), in any dtype of floats; NaN and infinity are counted, and left out."""
    values = weight.float()
    is_finite = torch.isfinite(values)
    num_non_finite = int((~is_finite).sum())
    values = torch.where(is_finite, values, torch.zeros_like(values))
    magnitudes = values.abs()
    absmax = float(magnitudes.max())
    columns = values.norm(dim=0)
    errors = _row_errors(values, rounding)
    num_damaged, damaged = _damage(values, errors, rounding)
    return LayerStatistics(
        name=name,
        num_out=weight.shape[0],
        num_in=weight.shape[1],
        absmax=absmax,
        kurtosis=_kurtosis(values),
        num_outlier_columns=int((columns >= _OUTLIER_RATIO * columns.median()).sum())
        if absmax
        else 0,
        saturation=_saturation(magnitudes, absmax),
        num_non_finite=num_non_finite,
        error=float(errors.median()),
        num_damaged_rows=num_damaged,
        damaged_error=damaged,
    )


def collect(
    weights: Iterable[tuple[str, torch.Tensor]],
    rounding: Rounding,
    advance: Callable[[], None] = lambda: None,
) -> list[LayerStatistics]:
    """Of every weight, one at a time; `advance` is called after each."""
    found = []
    for name, weight in weights:
        found.append(layer_statistics(name, weight, rounding))
        advance()
    return found


def _kurtosis(values: torch.Tensor) -> float:
    centred = (values - values.mean()).double()
    variance = centred.square().mean()
    if float(variance) == 0:
        return 0.0
    return float(centred.pow(4).mean() / variance.square()) - 3.0


def _saturation(magnitudes: torch.Tensor, absmax: float) -> float:
    """Of the weights at the largest magnitude those beyond the first."""
    if absmax == 0:
        return 0.0
    return (int((magnitudes == absmax).sum()) - 1) / magnitudes.numel()


def _row_errors(values: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    change = (rounding.image(values) - values).norm(dim=1)
    errors: torch.Tensor = change / values.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return errors


def _damage(
    values: torch.Tensor, errors: torch.Tensor, rounding: Rounding
) -> tuple[int, tuple[float, float] | None]:
    """Rows that are worse off for double quantization, and the worst of them."""
    if not (rounding.double_quant and rounding.kind in ("nf4", "fp4")):
        return 0, None
    single = _row_errors(values, Rounding(rounding.kind, rounding.block_size, False))
    is_damaged = (errors > _DAMAGE_RATIO * single) & (single > 0)
    if not is_damaged.any():
        return 0, None
    worst = int(torch.where(is_damaged, errors / single, torch.zeros_like(errors)).argmax())
    return int(is_damaged.sum()), (float(single[worst]), float(errors[worst]))
