"""Which layers keep more bits: the best there is, and better than uniform ways of the size."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from qlora_kit.errors import ModelError
from qlora_kit.model.base import Base
from qlora_kit.model.bits import module_bits
from qlora_kit.model.quantized import count_quantized
from qlora_kit.model.weight import dequantized_weight
from qlora_kit.quantize.mixed import (
    Mixture,
    Options,
    Width,
    narrowest,
    overrides_of,
    widenings,
    within_bytes,
    within_kl,
)
from qlora_kit.quantize.mixed_base import (
    choose_mixture,
    require_loadable,
    unquantizable_bytes,
)
from qlora_kit.quantize.mixed_base import narrowest_bytes as bytes_by_shape
from qlora_kit.quantize.progressive import descend
from qlora_kit.quantize.rounding import Rounding, image_of
from qlora_kit.quantize.sensitivity.measure import (
    Plan,
    Sensitivity,
    measure_sensitivity,
    reference_of,
)
from qlora_kit.recipe import QuantizationSpec
from qlora_kit.report import sensitivity as report
from qlora_kit.report.reporter import Reporter

from .wide_models import load, some_rows, wide_llama

# On matrices this small the table of double quantization would take more than it saves.
NF4 = Rounding("nf4", 64, False)


def random_units(count: int, seed: int) -> list[Options]:
    rng = random.Random(seed)
    made = []
    for number in range(count):
        size, kl = rng.randint(1, 9), rng.random()
        widths = (Width(4, 4 * size, kl), Width(8, 8 * size, kl * rng.random() / 9))
        made.append(Options(f"u{number}", (f"u{number}.w",), (*widths, Width(16, 16 * size, 0.0))))
    return made


def best_kl(units: list[Options], budget: int) -> float:
    """By trying everything."""
    return min(
        sum(width.kl for width in choice)
        for choice in itertools.product(*(unit.widths for unit in units))
        if sum(width.num_bytes for width in choice) <= budget
    )


class TestTheChoice:
    @pytest.mark.parametrize("seed", range(4))
    def test_is_the_best_at_every_rung_and_near_it_between(self, seed: int) -> None:
        units = random_units(6, seed)
        for mixture in widenings(units, 100):
            assert mixture.expected_kl == pytest.approx(best_kl(units, mixture.num_bytes - 100))
            found = within_bytes(units, 100, mixture.num_bytes)
            assert found.num_bytes <= mixture.num_bytes
            assert found.expected_kl <= mixture.expected_kl + 1e-12
        low, high = narrowest(units, 0).num_bytes, widenings(units, 0)[-1].num_bytes
        for budget in range(low, high, 5):
            found = within_bytes(units, 0, budget)
            assert found.num_bytes <= budget
            worst = max(unit.widths[0].kl for unit in units)
            assert found.expected_kl <= best_kl(units, budget) + worst

    def test_goes_from_the_narrowest_to_the_widest(self) -> None:
        units = random_units(5, 9)
        ladder = widenings(units, 7)
        assert set(ladder[0].bits.values()) == {4}
        assert set(ladder[-1].bits.values()) == {16}
        assert [one.num_bytes for one in ladder] == sorted(one.num_bytes for one in ladder)
        kls = [one.expected_kl for one in ladder]
        assert kls == sorted(kls, reverse=True)

    def test_passes_over_a_width_that_is_not_worth_it(self) -> None:
        """8 bits that save next to nothing, where 16 save all."""
        unit = Options("u", ("u",), (Width(4, 4, 1.0), Width(8, 8, 0.99), Width(16, 16, 0.0)))
        assert [one.bits["u"] for one in widenings([unit], 0)] == [4, 16]

    def test_is_refused_where_nothing_fits(self) -> None:
        with pytest.raises(ModelError, match=r"budget of 953.67 MiB is less than the .* MiB that"):
            within_bytes(random_units(3, 0), 10**9, 10**9)

    def test_of_a_quality_is_the_smallest_that_has_it(self) -> None:
        ladder = widenings(random_units(8, 1), 0)
        asked = []

        def measure(mixture: Mixture) -> float:
            asked.append(mixture)
            return mixture.expected_kl * 1.5

        wanted = ladder[3].expected_kl * 1.5
        assert within_kl(ladder, measure, wanted) is ladder[3]
        assert len(asked) <= len(ladder).bit_length() + 1
        with pytest.raises(ModelError, match="the widest mixture is at a KL of"):
            within_kl(ladder, lambda mixture: 0.5, 0.1)

    def test_is_written_as_overrides(self) -> None:
        units = [
            Options(name, (name,), random_units(1, 0)[0].widths)
            for name in ("l.0.up", "l.0.q", "l.0.v", "l.1.up", "l.1.q", "l.1.v")
        ]
        bits = {"l.0.up": 8, "l.1.up": 8, "l.0.q": 4, "l.1.q": 16, "l.0.v": 4, "l.1.v": 4}
        assert overrides_of(Mixture(bits, 0, 0.0), units, 4) == {"up": 8, "l.1.q": 16}
        blocks = [Options("l.0", ("l.0.up", "l.0.q"), random_units(1, 0)[0].widths)]
        assert overrides_of(Mixture({"l.0": 8}, 0, 0.0), blocks, 4) == {"l.0.up": 8, "l.0.q": 8}


class Tables(Reporter):
    """What was said and shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.titles: list[str] = []
        self.columns: tuple[str, ...] = ()
        self.rows: list[tuple[str, ...]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.titles.append(title)
        self.columns = tuple(columns)
        self.rows = [tuple(row) for row in rows]


def test_a_measured_kl_is_told_from_an_estimated_one(base: Base) -> None:
    rows = some_rows(4)
    checked = measure_sensitivity(base, rows, Plan(NF4, is_exact=False, check=3))
    heard = Tables()
    report.ranking(heard, checked, 99)
    shown = {row[0]: dict(zip(heard.columns, row, strict=True)) for row in heard.rows}
    for entry in checked.entries:
        row = shown[entry.unit.name]
        assert row["estimated KL"] == f"{entry.estimate:.3g}"
        assert row["KL"] == ("–" if entry.cost is None else f"{entry.cost.kl:.3g}")
    assert sum(row["KL"] != "–" for row in shown.values()) == 3
    report.ranking(heard, measure_sensitivity(base, rows, Plan(NF4, is_exact=False)), 99)
    assert heard.columns[2:] == ("estimated KL", "share of the estimates")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_llama(tmp_path_factory.mktemp("wide"), 4)


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load(folder)


@pytest.fixture(scope="module")
def found(base: Base) -> Sensitivity:
    return measure_sensitivity(base, some_rows(16, 30), Plan(NF4))


class TestOnAModel:
    def test_it_beats_uniform_ways_of_the_size(self, base: Base, found: Sensitivity) -> None:
        """On rows that the ranking has not seen, at the bytes of NF4 in blocks of 32."""
        uniform = Rounding("nf4", 32, False)
        budget = unquantizable_bytes(base.skeleton) + sum(
            uniform.num_bytes(*base.model.get_submodule(name).weight.shape)
            for name in base.skeleton.linear_modules
        )
        with reference_of(base, some_rows(16, 30, seed=8)) as reference:
            chosen = choose_mixture(base, found, reference, budget_bytes=budget)
        assert chosen.measured.num_bytes <= budget
        rivals = {one.name: one for one in chosen.others}
        assert rivals["nf4, block 32 throughout"].num_bytes == budget
        assert len(rivals) == 4
        for rival in chosen.others:
            assert chosen.measured.divergence.kl_mean < rival.divergence.kl_mean, rival.name

    def test_what_was_measured_is_what_the_recipe_loads(
        self, base: Base, found: Sensitivity, folder: Path
    ) -> None:
        """The very weights; LLM.int8() rounds what goes into a layer as well, when it evaluates."""
        least = narrowest_bytes(base, found)
        with reference_of(base, some_rows(4)) as reference:
            chosen = choose_mixture(base, found, reference, budget_bytes=int(least * 1.08))
        assert {4, 8} <= set(chosen.mixture.bits.values())
        written = json.loads(json.dumps(dict(chosen.quantization)))
        spec = QuantizationSpec.model_validate(written)
        mixed = load(folder, spec)
        bits = module_bits(base.skeleton, spec)
        ways = {4: NF4, 8: Rounding("int8"), 16: Rounding("none")}
        for name in base.skeleton.linear_modules:
            assert bits[name] == chosen.mixture.bits[name]
            image = image_of(base.model.get_submodule(name), ways[bits[name]])
            assert torch.equal(dequantized_weight(mixed.model.get_submodule(name)), image), name

    def test_what_is_the_mixture_itself_is_no_other_way(
        self, base: Base, found: Sensitivity
    ) -> None:
        with reference_of(base, some_rows(2)) as reference:
            whole = choose_mixture(base, found, reference, budget_bytes=2**40)
            least = narrowest_bytes(base, found)
            narrow = choose_mixture(base, found, reference, budget_bytes=least)
        assert not whole.mixture.is_quantized
        assert whole.measured.name == "16 bits throughout"
        assert whole.quantization == {"load_in_4bit": False}
        assert [one.name for one in whole.others] == ["nf4, block 64 throughout"]
        assert least == bytes_by_shape(base.skeleton, NF4), "what is refused before the ranking"
        assert narrow.measured.name == "mixture"
        assert not [one for one in narrow.others if one.num_bytes == least]
        heard = Tables()
        report.chosen(heard, whole)
        assert heard.lines[0].endswith("MiB): nothing needs to be quantized.")
        assert "two bytes for each number that is not quantized" in heard.lines[1]
        assert heard.titles == [
            f"16 bits and uniform ways, on {whole.measured.divergence.num_tokens} other tokens"
        ]

    def test_its_bytes_are_those_of_the_loaded_base(
        self, base: Base, found: Sensitivity, folder: Path
    ) -> None:
        """But for what is not quantized, which is loaded in float32 here."""
        with reference_of(base, some_rows(2)) as reference:
            chosen = choose_mixture(base, found, reference, max_kl=1e-2)
        spec = QuantizationSpec.model_validate(dict(chosen.quantization))
        mixed = load(folder, spec)
        plain = sum(p.numel() for p in mixed.model.parameters() if p.dtype == torch.float32)
        scales = sum(
            layer.out_features * 4
            for layer in mixed.model.modules()
            if type(layer).__name__ == "Linear8bitLt"
        )
        loaded = count_quantized(mixed.model).weight_bytes - 2 * plain + scales
        assert chosen.measured.num_bytes == loaded
        assert chosen.measured.divergence.kl_mean <= 1e-2

    def test_stepping_down_stops_at_the_budget(self, base: Base, found: Sensitivity) -> None:
        with reference_of(base, some_rows(8, 30, seed=8)) as reference:
            descent = descend(base, found, reference, max_kl=0.05, num_steps=3)
            all_the_way = descend(base, found, reference, max_kl=1e9, num_steps=3)
        assert [stage.holds for stage in descent.stages[:-1]] == [True] * (len(descent.stages) - 1)
        assert not descent.stages[-1].holds
        assert descent.kept is descent.stages[-2]
        sizes = [stage.mixture.num_bytes for stage in all_the_way.stages]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == 1 + 3 + 3
        assert all_the_way.stages[0].divergence.kl_mean == 0
        assert set(all_the_way.stages[3].mixture.bits.values()) == {8}
        assert set(all_the_way.stages[6].mixture.bits.values()) == {4}
        assert dict(all_the_way.quantization) == {
            "load_in_4bit": True,
            "quant_type": "nf4",
            "double_quant": False,
        }
        spec = QuantizationSpec.model_validate(dict(descent.quantization))
        bits = module_bits(base.skeleton, spec)
        assert {name: bits[name] for name in descent.kept.mixture.bits} == dict(
            descent.kept.mixture.bits
        )


def test_what_no_recipe_can_load_is_refused() -> None:
    for rounding in (Rounding("nf4", 32), Rounding("int4")):
        with pytest.raises(ModelError, match="cannot be loaded as"):
            require_loadable(rounding)
    for rounding in (Rounding(), Rounding("fp4", 64, False), Rounding("int8")):
        require_loadable(rounding)


def narrowest_bytes(base: Base, found: Sensitivity) -> int:
    from qlora_kit.quantize.mixed_base import options_of

    units = options_of(found, base.skeleton)
    return narrowest(units, unquantizable_bytes(base.skeleton)).num_bytes
