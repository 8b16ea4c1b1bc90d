"""Divergence against torch's own KL in float64, in memory and through a record on disk."""

from __future__ import annotations

import math
import shutil
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.errors import DataError, HardwareError, ModelError
from qlora_kit.evaluate.divergence import (
    Divergence,
    compare_to_recorded,
    measure_divergence,
    record_logprobs,
)
from qlora_kit.evaluate.perplexity import measure_perplexity
from qlora_kit.runtime import forward

from .tiny_models import MODELS, NUM_TOKENS, SaysAlways, llama, rows, scorer

LENGTHS = [5, 31, 12, 2, 48, 31, 7]
BATCHES: dict[str, int] = {"batch_size": 3}


def nudged(model: PreTrainedModel, by: float) -> PreTrainedModel:
    """The same model, a little off everywhere."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


def expected_divergence(
    reference: PreTrainedModel, candidate: PreTrainedModel, sequences: Sequence[TokenSequence]
) -> dict[str, float]:
    """One sequence at a time, unpadded, with torch.nn.functional.kl_div."""
    kl, agree, delta = [], [], []
    for sequence in sequences:
        ids, labels = torch.tensor([sequence.input_ids]), torch.tensor(sequence.labels[1:])
        with torch.no_grad():
            p, q = (
                m(ids).logits[0, :-1][labels != IGNORE_INDEX].double().log_softmax(-1)
                for m in (reference, candidate)
            )
        kl.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
        agree.append((p.argmax(-1) == q.argmax(-1)).double())
        chosen = labels[labels != IGNORE_INDEX][:, None]
        delta.append((p - q).gather(1, chosen).abs().flatten())
    return {
        "kl_mean": float(torch.cat(kl).mean()),
        "kl_max": float(torch.cat(kl).max()),
        "top1_agreement": float(torch.cat(agree).mean()),
        "max_abs_delta_logp": float(torch.cat(delta).max()),
        "num_tokens": len(torch.cat(kl)),
    }


def on_disk(
    reference: PreTrainedModel,
    candidate: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    folder: Path,
    **options: int,
) -> Divergence:
    recorded = record_logprobs(scorer(reference), sequences, folder, **BATCHES, **options)
    return compare_to_recorded(scorer(candidate), recorded, **BATCHES)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by", [0.001, 0.1])
def test_equals_torch_in_float64(name: str, by: float, tmp_path: Path) -> None:
    reference, candidate = MODELS[name](), nudged(MODELS[name](), by)
    sequences = rows(LENGTHS)
    expected = expected_divergence(reference, candidate, sequences)
    assert expected["kl_mean"] > 1e-5
    for measured in (
        measure_divergence(scorer(reference), scorer(candidate), sequences, **BATCHES),
        on_disk(reference, candidate, sequences, tmp_path),
    ):
        for figure, value in expected.items():
            assert getattr(measured, figure) == pytest.approx(value, rel=1e-3), figure


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_perplexity(name: str, tmp_path: Path) -> None:
    reference, candidate = MODELS[name](0), MODELS[name](1)
    sequences = rows(LENGTHS)
    measured = on_disk(reference, candidate, sequences, tmp_path)
    for model, loss, perplexity in (
        (reference, measured.reference_loss, measured.reference_perplexity),
        (candidate, measured.candidate_loss, measured.candidate_perplexity),
    ):
        expected = measure_perplexity(
            scorer(model), sequences, window_tokens=None, stride_tokens=None, **BATCHES
        )
        assert loss == pytest.approx(expected.loss, abs=2e-6)
        assert perplexity == pytest.approx(expected.perplexity, rel=1e-5)


def test_is_zero_from_itself(tmp_path: Path) -> None:
    model, sequences = llama(), rows(LENGTHS)
    for measured in (
        measure_divergence(scorer(model), scorer(model), sequences, **BATCHES),
        on_disk(model, model, sequences, tmp_path),
    ):
        assert measured.kl_mean == measured.kl_max == measured.max_abs_delta_logp == 0.0
        assert measured.top1_agreement == 1.0
        assert measured.reference_loss == measured.candidate_loss


def test_direction_by_hand(tmp_path: Path) -> None:
    """KL(reference || candidate), not the other way round."""
    sequence = TokenSequence((0, 1), (IGNORE_INDEX, 1), "row")
    reference, candidate = SaysAlways([0.5, 0.5]), SaysAlways([0.9, 0.1])
    measured = on_disk(reference, candidate, [sequence], tmp_path)  # type: ignore[arg-type]
    assert measured.kl_mean == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert measured.max_abs_delta_logp == pytest.approx(math.log(5))
    assert measured.reference_perplexity == pytest.approx(2.0)
    assert measured.candidate_perplexity == pytest.approx(10.0)


def test_tokens_that_the_reference_rules_out_add_nothing(tmp_path: Path) -> None:
    sequence = TokenSequence((0, 1), (IGNORE_INDEX, 1), "row")
    some, none = SaysAlways([0.5, 0.4, 0.1]), SaysAlways([0.5, 0.5, 0.0])
    measured = on_disk(none, some, [sequence], tmp_path)  # type: ignore[arg-type]
    assert measured.kl_mean == pytest.approx(0.5 * math.log(0.5 / 0.4))
    measured = on_disk(none, none, [sequence], tmp_path)  # type: ignore[arg-type]
    assert measured.kl_mean == 0.0
    measured = on_disk(some, none, [sequence], tmp_path)  # type: ignore[arg-type]
    assert measured.kl_mean == math.inf


def test_order_batches_and_chunks_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, candidate, sequences = llama(0), llama(1), rows(LENGTHS)
    measured = measure_divergence(scorer(reference), scorer(candidate), sequences, **BATCHES)
    assert (
        measure_divergence(scorer(reference), scorer(candidate), sequences[::-1], **BATCHES)
        == measured
    )
    monkeypatch.setattr(forward, "CHUNK_CELLS", 2 * NUM_TOKENS)
    recorded = record_logprobs(scorer(reference), sequences, tmp_path, batch_size=7)
    other = compare_to_recorded(scorer(candidate), recorded, batch_size=1)
    for figure, value in vars(measured).items():
        assert getattr(other, figure) == pytest.approx(value, rel=1e-5), figure


def test_adapter_on_against_off(tmp_path: Path) -> None:
    """One model in two states, which only a record can compare."""
    model, sequences = llama(), rows(LENGTHS)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    recorded = record_logprobs(scorer(adapted), sequences, tmp_path, **BATCHES)
    assert compare_to_recorded(scorer(adapted), recorded, **BATCHES).kl_mean == 0.0
    with adapted.disable_adapter():
        off = compare_to_recorded(scorer(adapted), recorded, **BATCHES)
    assert off.kl_mean > 1e-3
    merged = compare_to_recorded(scorer(adapted.merge_and_unload()), recorded, **BATCHES)
    assert merged.kl_mean < 1e-9
    assert merged.top1_agreement == 1.0


def test_long_texts_go_through_windows(tmp_path: Path) -> None:
    reference, candidate, sequences = llama(0), llama(1), rows([61], context=0.0)
    options = {"window_tokens": 16, "stride_tokens": 8}
    measured = on_disk(reference, candidate, sequences, tmp_path, **options)
    assert measured.num_tokens == 60
    assert measured == measure_divergence(
        scorer(reference), scorer(candidate), sequences, **BATCHES, **options
    )
    assert measured != measure_divergence(
        scorer(reference), scorer(candidate), sequences, **BATCHES
    )


@pytest.mark.parametrize("cap", [1, 20, 1000])
def test_cap_is_told_and_kept(cap: int, tmp_path: Path) -> None:
    reference, candidate, sequences = llama(0), llama(1), rows(LENGTHS)
    available = sum(s.num_supervised for s in sequences)
    recorded = record_logprobs(scorer(reference), sequences, tmp_path, max_tokens=cap, **BATCHES)
    assert recorded.num_tokens == min(cap, available)
    assert recorded.num_available == available
    assert recorded.path.stat().st_size < recorded.num_tokens * NUM_TOKENS * 4 + 1024
    measured = compare_to_recorded(scorer(candidate), recorded, **BATCHES)
    assert measured.num_tokens == recorded.num_tokens
    assert measured == measure_divergence(
        scorer(reference), scorer(candidate), sequences, max_tokens=cap, **BATCHES
    )


def test_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(HardwareError, match="make room"):
        record_logprobs(scorer(llama()), rows(LENGTHS), tmp_path, **BATCHES)
    assert list(tmp_path.iterdir()) == []


def test_other_vocabulary_is_refused(tmp_path: Path) -> None:
    sequence = TokenSequence((0, 1), (IGNORE_INDEX, 1), "row")
    two, three = SaysAlways([0.5, 0.5]), SaysAlways([0.4, 0.5, 0.1])
    with pytest.raises(ModelError, match="one has 2 entries in its vocabulary, the other 3"):
        on_disk(two, three, [sequence], tmp_path)  # type: ignore[arg-type]


def test_broken_candidate_is_named(tmp_path: Path) -> None:
    reference, candidate, sequences = llama(), llama(), rows(LENGTHS)
    with torch.no_grad():
        candidate.lm_head.weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"rows\.jsonl:5 is not a number"):
        on_disk(reference, candidate, sequences, tmp_path)


def test_nothing_supervised_is_an_error(tmp_path: Path) -> None:
    silent = [TokenSequence((1, 2), (1, IGNORE_INDEX), "row")]
    with pytest.raises(DataError, match="without a supervised token"):
        record_logprobs(scorer(llama()), silent, tmp_path, **BATCHES)
    with pytest.raises(DataError, match="without a supervised token"):
        measure_divergence(scorer(llama()), scorer(llama()), silent, **BATCHES)
