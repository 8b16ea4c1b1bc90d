"""Estimates of one pass, against sums written out and against measurements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qlora_kit.model.base import Base
from qlora_kit.quantize.rounding import Rounding, image_of
from qlora_kit.quantize.sensitivity.cheap import estimate_costs
from qlora_kit.quantize.sensitivity.measure import Plan, measure_sensitivity
from qlora_kit.quantize.sensitivity.ranking import spearman, spread
from qlora_kit.report.reporter import Progress

from .wide_models import load, some_rows, wide_llama

NF4 = Rounding()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load(wide_llama(tmp_path_factory.mktemp("wide"), 4))


def test_sums_are_those_written_out(base: Base) -> None:
    """One row, one layer: δ and g by hand, from the input and the output of the layer."""
    (row,) = some_rows(1, 12)
    name = "model.layers.1.mlp.up_proj"
    layer = base.model.get_submodule(name)
    found = estimate_costs(
        base.model, [row], [name], {"a": NF4}, torch.float32, seed=1, progress=Progress()
    )["a"][name]

    kept = {}

    def hook(
        module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor:
        kept["x"] = args[0].detach()
        kept["y"] = output.detach().requires_grad_(True)
        return kept["y"]

    handle = layer.register_forward_hook(hook)
    logits = base.model(input_ids=torch.tensor([row.input_ids])).logits[0]
    handle.remove()
    places = [p - 1 for p, label in enumerate(row.labels) if p and label != -100]
    logprobs = torch.log_softmax(logits[places], dim=-1)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(logprobs.detach().exp(), 1, generator=generator)
    (g,) = torch.autograd.grad(logprobs.gather(1, drawn).sum(), kept["y"])
    change = kept["x"] @ (image_of(layer, NF4) - layer.weight.detach()).T
    by_token = [float(a @ b) for a, b in zip(g[0], change[0], strict=True)]
    n = row.num_supervised
    assert found["output"] == pytest.approx(float((change**2).sum()) / n, rel=1e-4)
    assert found["diagonal"] == pytest.approx(
        0.5 * float((g * change).square().sum()) / n, rel=1e-4
    )
    assert found["token"] == pytest.approx(0.5 * sum(v * v for v in by_token) / n, rel=1e-4)
    assert found["row"] == pytest.approx(0.5 * sum(by_token) ** 2 / n, rel=1e-4)


def test_nothing_is_left_on_the_model(base: Base) -> None:
    estimate_costs(
        base.model,
        some_rows(2),
        base.skeleton.linear_modules,
        {"a": NF4},
        torch.float32,
        seed=0,
        progress=Progress(),
    )
    assert not any(m._forward_hooks for m in base.model.modules())
    assert all(p.grad is None for p in base.model.parameters())


def test_the_order_is_that_of_the_measurements(base: Base) -> None:
    rows = some_rows(16, 24)
    found = measure_sensitivity(base, rows, Plan(NF4))
    assert found.check is not None
    assert found.check.num_units == 28
    assert found.check.spearman > 0.9
    total = sum(entry.estimate for entry in found.entries)
    assert total == pytest.approx(sum(entry.kl for entry in found.entries), rel=0.7)
    assert all(0 < entry.kl_8bit < entry.kl / 20 for entry in found.entries)


def test_estimates_alone_are_checked_on_as_many_as_asked(base: Base) -> None:
    rows = some_rows(8, 24)
    found = measure_sensitivity(base, rows, Plan(NF4, is_exact=False, check=6), some_rows(8, 30))
    assert sum(entry.cost is not None for entry in found.entries) == 6
    assert found.check is not None
    assert found.check.num_units == 6
    assert found.stability is not None
    assert found.stability.num_units == 28
    assert [entry.kl for entry in found.entries] == [entry.estimate for entry in found.entries]
    assert found.as_dict()["mode"] == "cheap"


class TestRanks:
    def test_agree_with_the_textbook(self) -> None:
        """Σd² = 194 over ten pairs: 1 - 6·194 / (10·99)."""
        iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
        hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
        assert spearman(iq, hours) == pytest.approx(1 - 6 * 194 / 990)

    def test_share_places_where_values_are_equal(self) -> None:
        assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1.0)
        first, second = np.array([1, 2.5, 2.5, 4]), np.array([1.0, 2, 3, 4])
        assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(
            np.corrcoef(first, second)[0, 1]
        )
        assert spearman([1, 1, 1], [1, 2, 3]) == 0.0

    def test_are_spread_over_the_whole_range(self) -> None:
        values = [5.0, 1.0, 4.0, 2.0, 3.0]
        assert spread(values, 3) == [1, 4, 0]
        assert spread(values, 9) == [1, 3, 4, 2, 0]
        assert spread(values, 1) == [0]
        assert spread(values, 0) == []


def test_rows_are_dealt_out_disjoint(tmp_path: Path) -> None:
    from qlora_kit.errors import DataError
    from qlora_kit.quantize.sensitivity.text import deal

    rows = some_rows(12, 20)
    one, other = deal(rows, 2, 60, 16, seed=0)
    assert sum(row.num_supervised for row in one) == 60
    assert sum(row.num_supervised for row in other) == 60
    assert not {row.input_ids for row in one} & {row.input_ids for row in other}
    assert deal(rows, 2, 60, 16, seed=0) == [one, other]
    with pytest.raises(DataError, match=r"2 sets of 600 tokens.*the rows have \d+"):
        deal(rows, 2, 600, 16, seed=0)
