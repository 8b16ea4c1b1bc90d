"""Perplexity against transformers' own loss, one sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.errors import DataError, ModelError
from qlora_kit.evaluate.perplexity import Perplexity, measure_perplexity
from qlora_kit.report.reporter import Progress
from qlora_kit.runtime import batches, forward
from qlora_kit.runtime.forward import CausalModel, evaluation_mode

from .tiny_models import MODELS, NUM_TOKENS, SaysAlways, WholeLogits, llama, rows, scorer

LENGTHS = [5, 31, 12, 2, 48, 31, 7]


def perplexity(
    model: CausalModel,
    sequences: Sequence[TokenSequence],
    *,
    batch_size: int = 3,
    window: int | None = None,
    stride: int | None = None,
    dtype: torch.dtype | None = None,
) -> Perplexity:
    return measure_perplexity(
        scorer(model, dtype),
        sequences,
        batch_size=batch_size,
        window_tokens=window,
        stride_tokens=stride,
    )


def upstream_loss(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> float:
    """The mean per token, from the mean per sequence that transformers gives."""
    total, count = 0.0, 0
    for sequence in sequences:
        with torch.no_grad():
            loss = model(
                input_ids=torch.tensor([sequence.input_ids]),
                labels=torch.tensor([sequence.labels]),
            ).loss
        total += float(loss) * sequence.num_supervised
        count += sequence.num_supervised
    return total / count


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("context", [0.0, 0.4])
def test_equals_upstream_loss(name: str, context: float) -> None:
    model, sequences = MODELS[name](), rows(LENGTHS, context=context)
    measured = perplexity(model, sequences)
    assert measured.loss == pytest.approx(upstream_loss(model, sequences), abs=2e-6)
    assert measured.perplexity == pytest.approx(math.exp(measured.loss))
    assert measured.num_tokens == sum(s.num_supervised for s in sequences)
    assert measured.loss > 3  # far from anything that a constant would give


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("window", "stride"), [(16, 4), (16, 15), (16, None), (7, 3)])
def test_sliding_window_equals_the_guide(name: str, window: int, stride: int | None) -> None:
    """Written out as the Hugging Face guide to perplexity has it, with upstream's own loss."""
    model, [sequence] = MODELS[name](), rows([61], context=0.0)
    ids = torch.tensor([sequence.input_ids])
    total, count, previous = 0.0, 0, 0
    for begin in range(0, 61, stride or window // 2):
        end = min(begin + window, 61)
        targets = ids[:, begin:end].clone()
        targets[:, : -(end - previous)] = IGNORE_INDEX
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=targets).loss
        counted = int((targets[:, 1:] != IGNORE_INDEX).sum())
        total += float(loss) * counted
        count += counted
        previous = end
        if end == 61:
            break
    measured = perplexity(model, [sequence], window=window, stride=stride)
    assert measured.num_tokens == count == 60
    assert measured.loss == pytest.approx(total / count, abs=2e-6)


def test_window_matters() -> None:
    model, sequences = llama(), rows([61], context=0.0)
    losses = {perplexity(model, sequences, window=w).loss for w in (4, 16, None)}
    assert len(losses) == 3


def test_stride_of_a_whole_window_misses_no_token() -> None:
    model, sequences = llama(), rows([61], context=0.0)
    measured = perplexity(model, sequences, window=16, stride=16)
    assert measured == perplexity(model, sequences, window=16, stride=15)
    assert measured.num_tokens == 60


@pytest.mark.parametrize("name", MODELS)
def test_batch_size_does_not_matter(name: str) -> None:
    model, sequences = MODELS[name](), rows(LENGTHS)
    alone = perplexity(model, sequences, batch_size=1)
    for batch_size in (2, 3, 7, 50):
        measured = perplexity(model, sequences, batch_size=batch_size)
        assert measured.loss == pytest.approx(alone.loss, abs=2e-6)
        assert measured.num_tokens == alone.num_tokens


def test_order_does_not_matter_to_the_last_bit() -> None:
    model, sequences = llama(), rows(LENGTHS)
    assert perplexity(model, sequences[::-1]) == perplexity(model, sequences)


def test_small_limits_of_memory_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sequences = llama(), rows(LENGTHS)
    expected = perplexity(model, sequences, batch_size=7)
    monkeypatch.setattr(forward, "CHUNK_CELLS", 3 * NUM_TOKENS)
    monkeypatch.setattr(batches, "LOGITS_BYTES", 4 * NUM_TOKENS * 30)
    measured = perplexity(model, sequences, batch_size=7)
    assert measured.loss == pytest.approx(expected.loss, abs=2e-6)
    assert measured.num_tokens == expected.num_tokens


def test_only_measured_positions_get_logits() -> None:
    model, sequences = llama(), rows([40, 40], context=0.9)
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    perplexity(model, sequences)
    places = {p for s in sequences for p in range(40) if s.labels[p] != IGNORE_INDEX}
    assert seen == [(2, len(places), NUM_TOKENS)]


def test_model_that_gives_logits_everywhere() -> None:
    model, sequences = llama(), rows(LENGTHS)
    old = WholeLogits(model.config).eval()
    old.load_state_dict(model.state_dict())
    assert perplexity(old, sequences).loss == pytest.approx(
        perplexity(model, sequences).loss, abs=2e-6
    )


def test_by_hand() -> None:
    """A model that gives every token a half, and one that gives the label a quarter."""
    sequence = TokenSequence((0, 1, 1), (IGNORE_INDEX, 1, 1), "row")
    measured = perplexity(SaysAlways([0.5, 0.5]), [sequence])  # type: ignore[arg-type]
    assert measured == Perplexity(pytest.approx(math.log(2)), pytest.approx(2.0), 2)
    measured = perplexity(SaysAlways([0.75, 0.25]), [sequence])  # type: ignore[arg-type]
    assert measured.perplexity == pytest.approx(4.0)


def test_label_that_is_ruled_out_gives_infinity() -> None:
    sequence = TokenSequence((0, 1), (IGNORE_INDEX, 1), "row")
    measured = perplexity(SaysAlways([1.0, 0.0]), [sequence])  # type: ignore[arg-type]
    assert measured.perplexity == math.inf


def test_adapter_counts_and_can_be_turned_off() -> None:
    model, sequences = llama(), rows(LENGTHS)
    plain = perplexity(model, sequences)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    assert abs(perplexity(adapted, sequences).loss - plain.loss) > 0.05
    with adapted.disable_adapter():
        assert perplexity(adapted, sequences).loss == pytest.approx(plain.loss, abs=1e-6)


def test_16_bits_with_norms_in_float32() -> None:
    """As a base is after preparation for training: only autocast brings the dtypes together."""
    model, sequences = llama(), rows(LENGTHS)
    expected = perplexity(model, sequences)
    model.to(torch.bfloat16)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.float()
    measured = perplexity(model, sequences, dtype=torch.bfloat16)
    assert measured.loss == pytest.approx(expected.loss, rel=0.05)
    assert measured.loss != expected.loss
    with pytest.raises(ModelError, match="dtype"):
        perplexity(model, sequences)


def test_leaves_every_module_in_its_mode_and_ready_to_train() -> None:
    model, sequences = llama(), rows(LENGTHS)
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    seen: list[tuple[bool, bool, bool]] = []
    model.lm_head.register_forward_hook(
        lambda module, _, out: seen.append((module.training, out.requires_grad, out.is_inference()))
    )
    perplexity(model, sequences)
    assert [module.training for module in model.modules()] == before
    assert set(seen) == {(False, False, False)}
    model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_modes_come_back_after_a_failure() -> None:
    model = llama()
    model.train()
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert all(module.training for module in model.modules())


def test_output_that_is_not_a_number_is_named() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"rows\.jsonl:5 is not a number"):
        perplexity(model, rows(LENGTHS))


def test_nothing_supervised_is_an_error() -> None:
    silent = TokenSequence((1, 2, 3), (1, IGNORE_INDEX, IGNORE_INDEX), "row")
    with pytest.raises(DataError, match="none of the 1 sequences"):
        perplexity(llama(), [silent])


def test_progress_counts_supervised_tokens() -> None:
    class Count(Progress):
        total = 0

        def update(self, advance: int = 1, **fields: str) -> None:
            self.total += advance

    count, sequences = Count(), rows(LENGTHS)
    measure_perplexity(
        scorer(llama()),
        sequences,
        batch_size=2,
        window_tokens=8,
        stride_tokens=4,
        progress=count,
    )
    assert count.total == sum(s.num_supervised for s in sequences)
