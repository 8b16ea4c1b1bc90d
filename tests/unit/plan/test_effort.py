"""What an operation has to do, beside a calculation by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from qlora_kit.plan.effort import CountedEffort, Effort
from qlora_kit.plan.numberless import Numberless

ROWS, INPUTS, OUTPUTS = 6, 5, 7
BATCH, HEADS, TOKENS, WIDTH = 2, 4, 16, 8
_FLOAT32 = 4


def counted(run: Callable[[], object]) -> Effort:
    counter = CountedEffort()
    with counter:
        run()
    return counter.effort


@pytest.fixture(params=["real", "fake"], autouse=True)
def _with_numbers_or_without(request: pytest.FixtureRequest) -> object:
    with Numberless() if request.param == "fake" else nullcontext():
        yield


def in_linear() -> torch.Tensor:
    rows = torch.ones(ROWS, INPUTS, requires_grad=True)
    return linear(rows, torch.ones(OUTPUTS, INPUTS, requires_grad=True))


def in_attention() -> torch.Tensor:
    shape = (BATCH, HEADS, TOKENS, WIDTH)
    query, key, value = (torch.ones(shape, requires_grad=True) for _ in range(3))
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def test_a_linear_layer_multiplies_and_adds_for_each_pair() -> None:
    rows, weight = torch.ones(ROWS, INPUTS), torch.ones(OUTPUTS, INPUTS)
    effort = counted(lambda: linear(rows, weight))
    # A view of the weight, and its product; what a product moves is in its own rate.
    assert effort == Effort(2 * ROWS * INPUTS * OUTPUTS, 0, 2)


def test_its_backward_pass_has_two_such_products() -> None:
    made = in_linear()
    gradient = torch.ones_like(made)
    effort = counted(lambda: made.backward(gradient))
    assert effort.products == 2 * 2 * ROWS * INPUTS * OUTPUTS


@pytest.mark.parametrize(
    ("one", "other"),
    [((16, 8), (3, 8, 4)), ((3, 4, 8), (8, 16)), ((4, 16), (16, 8)), ((3, 4, 8), (3, 8, 4))],
    ids=["rows", "columns", "shared", "each"],
)
def test_each_row_of_a_product_by_groups_meets_one_matrix(
    one: tuple[int, ...], other: tuple[int, ...]
) -> None:
    """All but the last, of three matrices each, are one product of 4 × 8 with 16 others."""
    matrices = torch.ones(one), torch.ones(other)
    shared = len(one) == 2 or len(other) == 2
    ends = torch.tensor([4, 8, 16], dtype=torch.int32) if shared else None
    effort = counted(lambda: torch._grouped_mm(*matrices, offs=ends))
    assert effort == Effort(2 * 4 * 8 * (16 if shared else 3 * 4), 0, 1)


def test_causal_attention_computes_half_of_its_scores() -> None:
    pairs = BATCH * HEADS * TOKENS * TOKENS / 2
    # Scores, and the values that they weigh.
    assert counted(in_attention).products == 2 * (2 * WIDTH * pairs)


def test_backward_it_computes_the_scores_anew() -> None:
    made = in_attention()
    gradient = torch.ones_like(made)
    pairs = BATCH * HEADS * TOKENS * TOKENS / 2
    # Scores again, then gradients of values, weights, queries and keys.
    assert counted(lambda: made.backward(gradient)).products == 5 * (2 * WIDTH * pairs)


def test_an_elementwise_operation_reads_what_it_is_given_and_writes_what_it_makes() -> None:
    one, other = torch.ones(ROWS, INPUTS), torch.ones(INPUTS, dtype=torch.bfloat16)
    effort = counted(lambda: one + other)
    assert effort == Effort(0, 2 * ROWS * INPUTS * _FLOAT32 + 2 * INPUTS, 1)


def test_a_view_moves_nothing() -> None:
    one = torch.ones(ROWS, INPUTS)
    assert counted(lambda: one.t().reshape(-1, 1, ROWS)[0]).moved_bytes == 0
    assert counted(one.t) == Effort(0, 0, 1)


def test_efforts_add_up() -> None:
    one = torch.ones(ROWS)
    effort = counted(lambda: (one + one) * one)
    assert effort == Effort(0, 2 * 3 * ROWS * _FLOAT32, 2)
