"""A mixture of widths chosen for a model, measured, and held against uniform ways of its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from qlora_kit.errors import ModelError
from qlora_kit.quantize.mixed import (
    Mixture,
    Options,
    overrides_of,
    size_text,
    widenings,
    widths_of,
    within_bytes,
    within_kl,
)
from qlora_kit.quantize.rounding import Rounding, shape_of
from qlora_kit.quantize.sensitivity.reference import Reference
from qlora_kit.recipe import QuantizationSpec
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from qlora_kit.evaluate.divergence import Divergence
    from qlora_kit.model.base import Base
    from qlora_kit.model.skeleton import Skeleton
    from qlora_kit.quantize.sensitivity.measure import Sensitivity

_SIXTEEN = Rounding("none")
_ALL_SIXTEEN = "16 bits throughout"
_BYTES_16BIT = 2
# What a recipe's `quantization` can say of 4-bit weights.
LOADED_BLOCK_SIZE = 64


@dataclass(frozen=True)
class Measured:
    """A way to keep the whole model."""

    name: str
    num_bytes: int
    """Of all weights in memory: those that are not quantized take two bytes each."""
    divergence: Divergence

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "num_bytes": self.num_bytes, **asdict(self.divergence)}


@dataclass(frozen=True)
class Chosen:
    """A mixture, what it is worth, and what other ways of (nearly) the same size are worth."""

    mixture: Mixture
    quantization: Mapping[str, Any]
    """The section of a recipe that loads it."""
    measured: Measured
    others: tuple[Measured, ...]
    """Uniform ways, and whole blocks in 16 bits: all but the first at least of its size, and none
    that is the mixture itself."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "quantization": dict(self.quantization),
            "expected_kl": self.mixture.expected_kl,
            "measured": self.measured.as_dict(),
            "others": [other.as_dict() for other in self.others],
        }


def require_loadable(rounding: Rounding) -> None:
    """Raises ModelError for a way to round that no recipe can ask for."""
    is_four = rounding.kind in ("nf4", "fp4") and rounding.block_size == LOADED_BLOCK_SIZE
    if not is_four and rounding.kind != "int8":
        raise ModelError(
            f"a base cannot be loaded as {rounding}, so no mixture is chosen of it; take --method "
            f"nf4 or fp4 with a block size of {LOADED_BLOCK_SIZE}, or int8."
        )


def uniform_base(rounding: Rounding) -> QuantizationSpec:
    """How a recipe asks for all linear layers at this width."""
    if rounding.num_bits == 4:
        kind: Literal["nf4", "fp4"] = "fp4" if rounding.kind == "fp4" else "nf4"
        return QuantizationSpec(
            load_in_4bit=True, quant_type=kind, double_quant=rounding.double_quant
        )
    return QuantizationSpec(load_in_8bit=True)


def options_of(found: Sensitivity, skeleton: Skeleton) -> list[Options]:
    """The widths of every unit, with what each is expected to cost."""
    rounding = found.plan.rounding
    made = []
    for entry in found.entries:
        shapes = [shape_of(skeleton.model.get_submodule(name)) for name in entry.unit.modules]
        kls = {8: entry.kl_8bit, rounding.num_bits: entry.kl}
        made.append(Options(entry.unit.name, entry.unit.modules, widths_of(shapes, kls, rounding)))
    return made


def choose_mixture(
    base: Base,
    found: Sensitivity,
    reference: Reference,
    *,
    budget_bytes: int | None = None,
    max_kl: float | None = None,
    reporter: Reporter = SILENT,
) -> Chosen:
    """The mixture of least expected KL within `budget_bytes`, or the smallest whose KL, measured
    on the rows of `reference`, is within `max_kl`; and uniform ways beside it.

    `reference` should be of other rows than `found`.

    Raises:
        ModelError: there is none.
    """
    assert (budget_bytes is None) != (max_kl is None)
    rounding = found.plan.rounding
    require_loadable(rounding)
    units = options_of(found, base.skeleton)
    other_bytes = unquantizable_bytes(base.skeleton)
    trial = Trial(reference, units, rounding)
    if budget_bytes is not None:
        mixture = within_bytes(units, other_bytes, budget_bytes)
    else:
        assert max_kl is not None
        ladder = widenings(units, other_bytes)
        with reporter.progress("looking for the smallest", len(ladder).bit_length() + 1) as bar:

            def kl_of(one: Mixture) -> float:
                kl = trial.of(one).kl_mean
                bar.update(1, kl=f"{size_text(one.num_bytes)}: KL {kl:.3g}")
                return kl

            mixture = within_kl(ladder, kl_of, max_kl)
    name = "mixture" if mixture.is_quantized else _ALL_SIXTEEN
    measured = Measured(name, mixture.num_bytes, trial.of(mixture))
    rivals = _rivals(base.skeleton, rounding, mixture.num_bytes, other_bytes)
    is_itself = trial.roundings(mixture)
    rivals = {name: rival for name, rival in rivals.items() if rival[1] != is_itself}
    others = []
    with reporter.progress("comparing with uniform ways", len(rivals)) as progress:
        for name, (num_bytes, roundings) in rivals.items():
            others.append(Measured(name, num_bytes, reference.measure_rounded(roundings)))
            progress.update()
    return Chosen(mixture, section_of(mixture, units, rounding), measured, tuple(others))


def unquantizable_bytes(skeleton: Skeleton) -> int:
    """Of embeddings, head, norms and biases, two bytes a number, tied ones once."""
    quantizable = {f"{name}.weight" for name in skeleton.linear_modules}
    parameters = skeleton.model.named_parameters()
    return _BYTES_16BIT * sum(p.numel() for name, p in parameters if name not in quantizable)


def narrowest_bytes(skeleton: Skeleton, rounding: Rounding) -> int:
    """Of the whole model with every linear layer kept as `rounding` says."""
    narrow = dict.fromkeys(skeleton.linear_modules, rounding)
    return _total(skeleton, narrow, unquantizable_bytes(skeleton))


@dataclass
class Trial:
    """Mixtures measured, each once, on the rows of a reference."""

    reference: Reference
    units: Sequence[Options]
    rounding: Rounding

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, ...], Divergence] = {}

    def of(self, mixture: Mixture) -> Divergence:
        key = tuple(mixture.bits[unit.name] for unit in self.units)
        if key not in self._known:
            self._known[key] = self.reference.measure_rounded(self.roundings(mixture))
        return self._known[key]

    def roundings(self, mixture: Mixture) -> dict[str, Rounding]:
        """By module."""
        ways = {8: Rounding("int8"), self.rounding.num_bits: self.rounding, 16: _SIXTEEN}
        return {name: ways[mixture.bits[unit.name]] for unit in self.units for name in unit.modules}


def _rivals(
    skeleton: Skeleton, rounding: Rounding, num_bytes: int, other_bytes: int
) -> dict[str, tuple[int, dict[str, Rounding]]]:
    """Uniform ways: the narrowest; the smallest that is no smaller than the mixture, by its scales;
    and the narrowest with the last, or the first, blocks left in 16 bits up to the same size.
    """
    names = skeleton.linear_modules
    if rounding.num_bits == 8:
        rivals = {"8 bits throughout": dict.fromkeys(names, rounding)}
    else:
        rivals = {f"{rounding} throughout": dict.fromkeys(names, rounding)}
        kinds = [
            Rounding(rounding.kind, block, nested) for block in (64, 32) for nested in (True, False)
        ]
        larger = [
            (total, one)
            for one in kinds
            if (total := _total(skeleton, dict.fromkeys(names, one), other_bytes)) >= num_bytes
        ]
        if larger:
            _, one = min(larger, key=lambda pair: pair[0])
            rivals[f"{one} throughout"] = dict.fromkeys(names, one)
    for where, order in (("first", names), ("last", names[::-1])):
        kept: dict[str, Rounding] = dict.fromkeys(names, rounding)
        count = 0
        for name in order:
            if _total(skeleton, kept, other_bytes) >= num_bytes:
                break
            kept[name] = _SIXTEEN
            count += 1
        if count == len(names):
            rivals[_ALL_SIXTEEN] = kept
        elif count:
            layers = "layer" if count == 1 else f"{count} layers"
            rivals[f"{rounding}, the {where} {layers} in 16 bits"] = kept
    return {
        name: (_total(skeleton, roundings, other_bytes), roundings)
        for name, roundings in rivals.items()
    }


def _total(skeleton: Skeleton, roundings: Mapping[str, Rounding], other_bytes: int) -> int:
    return other_bytes + sum(
        rounding.num_bytes(*shape_of(skeleton.model.get_submodule(name)))
        for name, rounding in roundings.items()
    )


def section_of(mixture: Mixture, units: Sequence[Options], rounding: Rounding) -> dict[str, Any]:
    """`quantization:` of a recipe; everything in 16 bits is no mixture of it."""
    overrides = overrides_of(mixture, units, rounding.num_bits)
    if all(bits == 16 for bits in mixture.bits.values()):
        return {"load_in_4bit": False}
    section: dict[str, Any] = {"load_in_8bit": True}
    if rounding.num_bits == 4:
        section = {
            "load_in_4bit": True,
            "quant_type": rounding.kind,
            "double_quant": rounding.double_quant,
        }
    return {**section, **({"overrides": overrides} if overrides else {})}
