"""Attention that takes the examples of a row one by one: what it is given, and what comes of it."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from qlora_kit.data.collate import Batch, Collator, IsolatingCollator
from qlora_kit.data.pack import PackedSequence
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.model import (
    blockwise_attention,
    by_example,
    example_masks,
    short_attention,
)
from qlora_kit.model.by_example import (
    attending_by_example,
    can_attend_by_example,
    example_lengths,
)
from qlora_kit.train.supervised_loss import supervised_only

from .zoo import COMMON, DENSE, NEW, OLD

NAMES = ("llama, untied", "qwen3: norms of queries", "gemma3", "gpt2: Conv1D, tied")


def model_of(name: str, attention: str = "sdpa") -> Any:
    kind, values = DENSE[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **COMMON, **values)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def rows(*lengths: int) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in lengths:
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        labels = (IGNORE_INDEX, *ids[1:])
        made.append(TokenSequence(tuple(ids), labels, ""))
    return made


def outcome(model: Any, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss over all supervised tokens, and every gradient."""
    model.zero_grad()
    inputs = {name: one for name, one in batch.items() if isinstance(one, torch.Tensor)}
    loss = model(**inputs, use_cache=False, num_items_in_batch=100).loss
    loss.backward()
    return float(loss.detach()), {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_in_one_row_is_what_it_is_when_padded(name: str) -> None:
    """Gemma 3 has layers with a sliding window of 8, which the longer examples exceed."""
    model = model_of(name)
    wanted = outcome(model, Collator(0)(rows(9, 20, 5, 20)))
    with attending_by_example(model):
        found = outcome(model, IsolatingCollator(0, flatten=True)(rows(9, 20, 5, 20)))
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    for key, one in wanted[1].items():
        torch.testing.assert_close(found[1][key], one, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("kind", ["gpt_bigcode", "persimmon", "ministral3"])
def test_a_model_need_not_hand_positions_to_its_attention(kind: str) -> None:
    """They are those that its stack of layers was called with, by PEFT's way, too."""
    no_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    values = {**COMMON, **({**OLD, **no_dropout} if kind == "gpt_bigcode" else NEW)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    wanted = outcome(model, Collator(0)(rows(9, 20, 5)))
    with attending_by_example(model):
        found = outcome(model, IsolatingCollator(0, flatten=True)(rows(9, 20, 5)))
        model.gradient_checkpointing_enable()
        model.train()
        again = outcome(model, IsolatingCollator(0, flatten=True)(rows(9, 20, 5)))
        with supervised_only(model):
            supervised = outcome(model, IsolatingCollator(0, flatten=True)(rows(9, 20, 5)))
        model.eval()
    behind = outcome(model, Collator(0)(rows(9, 20, 5)))
    for loss, gradients in (found, again, supervised, behind):
        assert loss == pytest.approx(wanted[0], rel=1e-6)
        for key, one in wanted[1].items():
            torch.testing.assert_close(gradients[key], one, rtol=1e-4, atol=1e-6)


def test_packed_rows_of_several_lengths_are_too() -> None:
    model = model_of("llama, untied")
    a, b, c, d = rows(9, 20, 5, 3)
    batch = IsolatingCollator(0)([PackedSequence((a, b)), PackedSequence((c, d))])
    wanted = outcome(model, batch)
    with attending_by_example(model):
        found = outcome(model, batch)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)


def test_each_example_is_attended_to_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama, untied")
    seen: list[tuple[int, Any]] = []
    own = by_example.sdpa_attention_forward

    def watched(module: Any, query: torch.Tensor, *given: Any, **options: Any) -> Any:
        seen.append((query.shape[2], options.get("attention_mask")))
        return own(module, query, *given, **options)

    monkeypatch.setattr(by_example, "sdpa_attention_forward", watched)
    with attending_by_example(model), torch.no_grad():
        outcome_of = IsolatingCollator(0, flatten=True)(rows(9, 20, 5))
        model(outcome_of["input_ids"], position_ids=outcome_of["position_ids"], use_cache=False)
    assert seen == [(9, None), (20, None), (5, None)] * 2


def test_long_examples_are_attended_to_in_blocks_where_that_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that see what came before alone; the numbers are the same."""
    model = model_of("llama, untied")
    seen: list[int] = []
    own = blockwise_attention.attend

    def watched(query: torch.Tensor, *given: Any) -> torch.Tensor:
        seen.append(query.shape[2])
        return own(query, *given)

    monkeypatch.setattr(blockwise_attention, "attend", watched)
    batch = IsolatingCollator(0, flatten=True)(rows(9, 200, 191, 225))
    with attending_by_example(model):
        wanted = outcome(model, batch)
    assert not seen
    with attending_by_example(model, is_blockwise=True):
        found = outcome(model, batch)
        assert seen == [200, 225] * 2
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    assert len(seen) == 4
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    for key, one in wanted[1].items():
        torch.testing.assert_close(found[1][key], one, rtol=1e-4, atol=1e-6)


def test_a_window_takes_no_mask_over_the_whole_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an example is no longer than the window, none at all."""
    model = model_of("gemma3")
    seen: list[tuple[int, Any]] = []
    own = by_example.sdpa_attention_forward

    def watched(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        seen.append((query.shape[2], None if mask is None else tuple(mask.shape)))
        return own(module, query, key, value, mask, **options)

    monkeypatch.setattr(by_example, "sdpa_attention_forward", watched)
    batch = IsolatingCollator(0, flatten=True)(rows(8, 20, 5))
    with attending_by_example(model), torch.no_grad():
        model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    assert seen == [(8, None), (20, (1, 1, 20, 20)), (5, None)] * 2


def test_one_example_longer_than_the_window_without_positions() -> None:
    model = model_of("gemma3")
    ids = torch.tensor([rows(30)[0].input_ids])
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        with attending_by_example(model):
            found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted)


def test_chunks_are_not_attended_to_by_example() -> None:
    """They would be counted from the beginning of the row."""
    model = model_of("llama, untied")
    model.config.attention_chunk_size = 8192
    assert not can_attend_by_example(model)


def masks_of(function: Any, local_size: int = 3) -> Any:
    options = {"mask_function": function, "device": "cpu"}
    return example_masks.ExampleMasks(2, local_size, options)


@pytest.mark.parametrize("band", [2, 1024])
def test_a_window_is_known_by_its_mask(band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_masks, "_BAND", band)
    window = masks_of(sliding_window_causal_mask_function(3))
    assert window.are_windows([(0, 0, 7), (1, 4, 2)])
    assert not window._made or all(one is None for one in window._made.values()), "nothing is kept"
    assert not masks_of(causal_mask_function).are_windows([(0, 0, 7)]), "it hides nothing"
    assert not masks_of(sliding_window_causal_mask_function(4)).are_windows([(0, 0, 7)])
    assert masks_of(sliding_window_causal_mask_function(4), 4).are_windows([(0, 0, 7)])


def test_what_stands_for_a_mask_hides_all_where_nobody_knows_it() -> None:
    options = {"mask_function": None, "device": "cpu"}
    placeholder = example_masks.placeholder_of(2, 5, 3, options)
    assert placeholder.shape == (2, 1, 5, 5)
    assert not placeholder.any()
    assert example_masks.masks_behind(placeholder[:, :, -2:]) is not None
    assert example_masks.masks_behind(placeholder.clone()) is None


def test_padding_masks_and_caches_are_as_ever() -> None:
    model = model_of("llama, untied")
    batch = Collator(0)(rows(9, 20))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        wanted = model(**inputs, use_cache=False).logits
        answer = model.generate(inputs["input_ids"][:1, :9], max_new_tokens=4, do_sample=False)
        with attending_by_example(model):
            found = model(**inputs, use_cache=False).logits
            again = model.generate(inputs["input_ids"][:1, :9], max_new_tokens=4, do_sample=False)
    assert torch.equal(found, wanted)
    assert torch.equal(again, answer)
    assert model.config._attn_implementation == "sdpa"


def test_where_examples_begin() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert example_lengths(positions) == ((3, 2, 1), (6,))


def test_positions_are_not_kept_alive() -> None:
    positions = torch.tensor([[0, 1, 0, 1]])
    by_example._last_lengths.of(positions)
    gone = weakref.ref(positions)
    del positions
    assert gone() is None


def test_who_can() -> None:
    assert can_attend_by_example(model_of("llama, untied"))
    assert not can_attend_by_example(model_of("llama, untied", "eager"))
    assert not can_attend_by_example(model_of("bloom: fused QKV, alibi", "eager"))
    assert not can_attend_by_example(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", NAMES[:2])
def test_short_examples_in_bfloat16_are_given_to_their_own_attention(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which computes the same as torch's, for examples in a row and for a row that is one."""
    model = model_of(name).to(torch.bfloat16)
    given: list[tuple[int, bool]] = []
    own = short_attention.attend

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *how: Any) -> torch.Tensor:
        given.append((q.shape[2], how[0]))
        return own(q, k, v, *how)

    monkeypatch.setattr(short_attention, "attend", watched)
    for lengths in ((9, 20, 5), (33,)):
        batch = IsolatingCollator(0)(rows(*lengths))
        with attending_by_example(model):
            loss, gradients = outcome(model, batch)
            asked, given[:] = sorted(given), []
            monkeypatch.setattr(short_attention, "covers", lambda *_: False)
            wanted_loss, wanted = outcome(model, batch)
            monkeypatch.undo()
            monkeypatch.setattr(short_attention, "attend", watched)
        num_layers = model.config.num_hidden_layers
        counts = Counter(asked)  # of what fills up a row too
        assert all(counts[length, True] == num_layers * lengths.count(length) for length in lengths)
        assert given == []
        assert loss == wanted_loss
        for key, gradient in gradients.items():
            apart = (gradient - wanted[key]).float().norm() / wanted[key].float().norm()
            assert apart < 0.05, key
