"""FlashAttention over rows of several examples, with a kernel of torch's own on a CPU in its place;
`tests/gpu` runs the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qlora_kit.data.collate import Collator, IsolatingCollator
from qlora_kit.data.pack import PackedSequence
from qlora_kit.model import variable_length
from qlora_kit.model.by_example import (
    Seen,
    attending_by_example,
    gains_by_example,
    watched_attention,
)
from qlora_kit.train.batching import kernels_left

from .test_by_example import NAMES, model_of, outcome, rows

CPU = torch.device("cpu")
_calls: list[dict[str, Any]] = []


def newest(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As torch 2.14 documents it: (T, heads, D), examples between the places of `cu_seq_q`."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert int(cu_seq_q[-1]) == len(query) == len(key)
    _calls.append({"examples": len(cu_seq_q) - 1, "scale": scale, "window": window_size})
    lengths = cu_seq_q.diff().tolist()
    times = query.shape[1] // key.shape[1]
    made = []
    for q, k, v in zip(*(one.split(lengths) for one in (query, key, value)), strict=True):
        heads = [one.transpose(0, 1) for one in (q, k, v)]
        heads[1:] = [one.repeat_interleave(times, 0) for one in heads[1:]]
        ones = torch.ones((len(q), len(q)), dtype=torch.bool)
        before, after = (len(q) if one < 0 else one for one in window_size)
        seen = ones.tril(after).triu(-before)
        attended = F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale)
        made.append(attended.transpose(0, 1))
    return torch.cat(made)


def older(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> torch.Tensor:
    """As torch 2.10 had it: no scale, as many heads everywhere."""
    assert query.shape[1] == key.shape[1]
    window = (-1, 0) if is_causal else (-1, -1)
    return newest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kernel that works on this device, float32 included."""
    stand_in(monkeypatch, newest)
    yield
    forget()


def stand_in(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    forget()
    _calls.clear()
    known = frozenset(variable_length.inspect.signature(run).parameters)
    monkeypatch.setattr(variable_length, "_torch_kernel", lambda: (run, known))
    monkeypatch.setattr(variable_length, "is_suitable", lambda device, dtype: True)
    monkeypatch.setattr(variable_length, "_WIDTHS_ARE_MULTIPLES_OF", 1)
    monkeypatch.setitem(variable_length._TOLERANCE, torch.float32, 1e-5)

    def covers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        heads = (query.shape[1], key.shape[1])
        return variable_length.is_sound(query.device, query.dtype, *heads, query.shape[-1])

    monkeypatch.setattr(variable_length, "covers", covers)


def forget() -> None:
    variable_length.is_sound.cache_clear()
    variable_length._ends.cache_clear()
    variable_length._failures.clear()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_computes_the_same_in_one_call(name: str, kernel: None) -> None:
    model = model_of(name)
    wanted = outcome(model, Collator(0)(rows(9, 20, 5, 20)))
    with attending_by_example(model):
        found = outcome(model, IsolatingCollator(0, flatten=True)(rows(9, 20, 5, 20)))
    assert any(call["examples"] == 4 for call in _calls), "nothing went through the kernel"
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    for key, one in wanted[1].items():
        torch.testing.assert_close(found[1][key], one, rtol=1e-4, atol=1e-6)


def test_several_rows_are_one_call_too(kernel: None) -> None:
    model = model_of("llama, untied")
    a, b, c, d = rows(9, 20, 5, 3)
    batch = IsolatingCollator(0)([PackedSequence((a, b)), PackedSequence((c, d))])
    wanted = outcome(model, batch)
    with attending_by_example(model):
        outcome(model, batch)
        _calls.clear()  # among them those of the trial
        found = outcome(model, batch)
    # The filling of the second row is an example of its own.
    assert [call["examples"] for call in _calls] == [5, 5]
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)


def test_a_window_is_the_kernel_s(kernel: None) -> None:
    """Of 8 tokens in all layers of this model, and longer examples."""
    model = model_of("gemma3")
    with attending_by_example(model):
        outcome(model, IsolatingCollator(0, flatten=True)(rows(9, 20)))
    assert [call["window"] for call in _calls if call["examples"] == 2] == [(7, 0)] * 2


def test_a_torch_that_knows_no_window_takes_examples_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch, older)
    model = model_of("gemma3")
    wanted = outcome(model, Collator(0)(rows(9, 20, 5)))
    with attending_by_example(model):
        found = outcome(model, IsolatingCollator(0, flatten=True)(rows(9, 20, 5)))
    assert not [call for call in _calls if call["examples"] == 3]
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    forget()


@pytest.mark.parametrize("run", [newest, older])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("is_causal", [True, False])
def test_versions_of_torch(
    run: Any, scale: float | None, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, run)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    found = variable_length.attend(query, key, value, [(5, 7)], scale, is_causal)
    for start, end in ((0, 5), (5, 12)):
        q, k, v = (one[:, :, start:end] for one in (query, key, value))
        wanted = F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True
        )
        torch.testing.assert_close(found[:, start:end], wanted.transpose(1, 2))


def test_a_kernel_that_comes_to_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(query: Any, key: Any, value: Any, ends: Any, *given: Any, **options: Any) -> Any:
        whole = torch.tensor([0, len(query)], dtype=torch.int32)
        return newest(query, key, value, whole, whole, len(query), len(query), **options)

    known = {"scale", "window_size", "enable_gqa"}
    stand_in(monkeypatch, newest)
    monkeypatch.setattr(variable_length, "_torch_kernel", lambda: (leaky, known))
    assert not variable_length.is_sound(CPU, torch.float32, 4, 2, 8)
    (why,) = variable_length.failures()
    assert why.startswith("on a trial it is ")
    assert kernels_left() == [f"FlashAttention over the examples of a row: {why}"]
    assert how_attended(model_of("llama, untied")) == Seen(in_one_call=0, one_by_one=2)
    forget()


def test_a_kernel_that_fails_is_left_out_and_memory_that_runs_out_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*given: Any, **options: Any) -> Any:
        raise error

    stand_in(monkeypatch, newest)
    monkeypatch.setattr(variable_length, "_torch_kernel", lambda: (failing, frozenset()))
    error: Exception = RuntimeError("no kernel image is available")
    assert not variable_length.is_sound(CPU, torch.float32, 4, 2, 8)
    assert variable_length.failures() == ("it fails (RuntimeError: no kernel image is available)",)
    error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        variable_length.is_sound(CPU, torch.float32, 4, 4, 8)
    forget()


def test_what_it_is_not_asked_for() -> None:
    forget()
    assert not variable_length.is_sound(CPU, torch.bfloat16, 4, 2, 64)
    query = torch.zeros(1, 4, 3, 8)
    assert not variable_length.covers(query, query, query)
    assert variable_length.failures() == ()


def test_heads_of_other_widths_are_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in latent attention, whose values are narrower than its queries and keys."""
    monkeypatch.setattr(variable_length, "is_sound", lambda *_: True)
    wide, narrow = (SimpleNamespace(is_cuda=True, shape=(1, 4, 9, w)) for w in (192, 128))
    for one in (wide, narrow):
        one.device, one.dtype = "cuda", torch.bfloat16
    covers: Any = variable_length.covers
    assert covers(narrow, narrow, narrow)
    assert not covers(wide, wide, narrow)


def how_attended(model: Any) -> Seen:
    """Of a batch of several examples, by layers."""
    batch = IsolatingCollator(0, flatten=True)(rows(9, 20, 5))
    with watched_attention() as seen, attending_by_example(model), torch.no_grad():
        model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    return seen


def test_a_probe_sees_how_examples_are_taken(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama, untied")
    assert how_attended(model) == Seen(in_one_call=2, one_by_one=0)
    monkeypatch.setattr(variable_length, "covers", lambda *_: False)
    assert how_attended(model) == Seen(in_one_call=0, one_by_one=2)


def test_a_gpu_may_gain_where_the_kernel_is_made_for_it(kernel: None) -> None:
    gpu = torch.device("cuda")
    assert gains_by_example(model_of("llama, untied"), gpu, torch.bfloat16)
    assert not gains_by_example(model_of("llama, untied", "eager"), gpu, torch.bfloat16)
    dropping = model_of("llama, untied")
    dropping.config.attention_dropout = 0.1
    assert not gains_by_example(dropping, gpu, torch.bfloat16)
    assert gains_by_example(dropping, CPU, torch.float32)
    latent = model_of("llama, untied")
    latent.config.qk_nope_head_dim, latent.config.qk_rope_head_dim = 8, 8
    latent.config.v_head_dim = 16
    assert gains_by_example(latent, gpu, torch.bfloat16)
    latent.config.v_head_dim = 12
    assert not gains_by_example(latent, gpu, torch.bfloat16)
