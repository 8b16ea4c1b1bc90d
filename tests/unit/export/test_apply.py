"""Every part of an adapter finds its tensor, or is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from qlora_kit.errors import AdapterError
from qlora_kit.export.apply import Merger
from qlora_kit.export.delta import Rows, SavedAdapter
from qlora_kit.export.dense import DenseTensor
from qlora_kit.export.ties import Ties, Vocabulary
from qlora_kit.model.skeleton import Skeleton, build_skeleton

from .tiny_runs import CONFIGS, NUM_TOKENS

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
APART = Ties(kept=(), broken=(), duplicates=frozenset(), apart=False)


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    return build_skeleton(CONFIGS["llama"]())


def merger(
    skeleton: Skeleton,
    replaced: dict[str, torch.Tensor] | None = None,
    rows: dict[str, Rows] | None = None,
    num_rows: int = NUM_TOKENS,
    ties: Ties = APART,
) -> Merger:
    adapter = SavedAdapter(Path("adapter"), LoraConfig(), {}, replaced or {}, rows or {})
    vocabulary = Vocabulary(num_rows, frozenset({EMBEDDING}), num_rows > NUM_TOKENS)
    return Merger(adapter, skeleton, ties, vocabulary)


def dense(parameter: str, *shape: int) -> DenseTensor:
    return DenseTensor(f"stored.{parameter}", parameter, torch.zeros(shape), torch.float32)


def test_what_no_tensor_takes_is_named(skeleton: Skeleton) -> None:
    ours = merger(skeleton, replaced={NORM: torch.ones(64)})
    with pytest.raises(AdapterError, match=rf"nothing in the base takes {NORM}"):
        list(ours.merge([dense(EMBEDDING, NUM_TOKENS, 64)]))


def test_a_replaced_tensor_keeps_the_name_it_is_stored_under(skeleton: Skeleton) -> None:
    ours = merger(skeleton, replaced={NORM: torch.ones(64).half()})
    (merged,) = ours.merge([dense(NORM, 64)])
    assert merged.name == f"stored.{NORM}"
    assert torch.equal(merged.value, torch.ones(64))
    assert merged.base is None


def test_a_replaced_tensor_of_another_shape_is_refused(skeleton: Skeleton) -> None:
    ours = merger(skeleton, replaced={NORM: torch.ones(32)})
    with pytest.raises(AdapterError, match=r"is \(32,\) in the adapter and \(64,\) in the base"):
        list(ours.merge([dense(NORM, 64)]))


def test_rows_are_put_in_place_and_the_rest_stays(skeleton: Skeleton) -> None:
    rows = {"model.embed_tokens": Rows((3, NUM_TOKENS), torch.ones(2, 64))}
    ours = merger(skeleton, rows=rows, num_rows=NUM_TOKENS + 1)
    (merged,) = ours.merge([dense(EMBEDDING, NUM_TOKENS, 64)])
    assert merged.value.shape == (NUM_TOKENS + 1, 64)
    assert merged.value.sum(1).nonzero().flatten().tolist() == [3, NUM_TOKENS]


def test_both_sides_of_a_broken_tie_are_written(skeleton: Skeleton) -> None:
    ties = Ties((), (("lm_head.weight", EMBEDDING),), frozenset(), False)
    ours = merger(skeleton, replaced={"lm_head.weight": torch.ones(NUM_TOKENS, 64)}, ties=ties)
    merged = {one.name: one.value for one in ours.merge([dense(EMBEDDING, NUM_TOKENS, 64)])}
    assert set(merged) == {f"stored.{EMBEDDING}", "lm_head.weight"}
    assert float(merged["lm_head.weight"].min()) == 1.0
    assert float(merged[f"stored.{EMBEDDING}"].max()) == 0.0


def test_tensors_that_are_fused_pass_untouched(skeleton: Skeleton) -> None:
    tensor = DenseTensor("experts.0.w1", None, torch.ones(2, 2), torch.bfloat16)
    (merged,) = merger(skeleton).merge([tensor])
    assert merged.value is tensor.value
