"""llama.cpp says of a tiny model what transformers says of it, and is counted truly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.errors import ModelError
from qlora_kit.evaluate.perplexity import measure_perplexity
from qlora_kit.runtime.gguf_header import read_header
from qlora_kit.runtime.llama_cpp import LlamaCppRuntime, find_gguf
from qlora_kit.runtime.open import open_runtime

if TYPE_CHECKING:
    from conftest import GgufFiles


def windows(lengths: tuple[int, ...] = (40, 5, 17, 2)) -> list[TokenSequence]:
    """Rows of every length; the first third of each is not supervised."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 270, (length,), generator=generator).tolist()
        labels = [IGNORE_INDEX if at < length // 3 else token for at, token in enumerate(ids)]
        rows.append(TokenSequence(tuple(ids), tuple(labels), f"row {number}"))
    return rows


@pytest.fixture(scope="module")
def reference(loud_llama: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(loud_llama, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def runtime(made_gguf: GgufFiles) -> Iterator[LlamaCppRuntime]:
    opened = open_runtime(str(made_gguf["F16"][0]))
    assert isinstance(opened, LlamaCppRuntime)
    yield opened
    opened.close()


def logits_of(model: PreTrainedModel, row: TokenSequence) -> torch.Tensor:
    wanted = [at for at, label in enumerate(row.labels) if at > 0 and label != IGNORE_INDEX]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([row.input_ids])).logits[0]
    return logits[[at - 1 for at in wanted]]


def kl(expected: torch.Tensor, got: torch.Tensor) -> float:
    one, other = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_transformers(
    runtime: LlamaCppRuntime, reference: PreTrainedModel, batch_size: int
) -> None:
    rows = windows()
    scored = {one.index: one for one in runtime.score(rows, batch_size)}
    assert sorted(scored) == [0, 1, 2, 3]
    for index, row in enumerate(rows):
        expected = logits_of(reference, row)
        assert scored[index].logits.shape == expected.shape
        assert expected.std() > 0.5, "logits so small that any would agree"
        assert kl(expected, scored[index].logits) < 5e-5
        supervised = [label for label in row.labels[1:] if label != IGNORE_INDEX]
        assert scored[index].targets.tolist() == supervised


def test_eight_bits_are_near_and_not_the_same(
    made_gguf: GgufFiles, reference: PreTrainedModel, runtime: LlamaCppRuntime
) -> None:
    rows = windows()
    rounded = LlamaCppRuntime.open(made_gguf["Q8_0"][0])
    try:
        for one in rounded.score(rows, 4):
            expected = logits_of(reference, rows[one.index])
            assert 1e-4 < kl(expected, one.logits) < 3e-2
    finally:
        rounded.close()


def test_answers_are_those_of_transformers(
    runtime: LlamaCppRuntime, reference: PreTrainedModel
) -> None:
    """Each alone and several at a time, where one takes the place of another that has ended."""
    prompts = [row.input_ids for row in windows((7, 3, 11, 1, 5))]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(runtime.stop_ids),
        )
        wanted.append(out[0, len(prompt) :].tolist())
    assert runtime.generate(prompts, 12, batch_size=1) == wanted
    assert runtime.generate(prompts, 12, batch_size=3) == wanted


def test_answers_end_at_a_stop_token_and_where_the_context_does(
    runtime: LlamaCppRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = (row.input_ids for row in windows((7,)))
    (whole,) = runtime.generate([prompt], 12, 1)
    end = whole[4]
    monkeypatch.setattr(runtime, "_stop_ids", frozenset({end}))
    assert runtime.generate([prompt, prompt], 12, 2) == [whole[: whole.index(end) + 1]] * 2
    monkeypatch.setattr(runtime, "_stop_ids", frozenset())
    assert runtime.context_tokens == 256
    long = windows((250,))[0].input_ids
    assert len(runtime.generate([long], 12, 1)[0]) == 6
    assert runtime.generate([windows((256,))[0].input_ids], 12, 1) == [[]]


def test_perplexity_is_that_of_a_plain_loop(runtime: LlamaCppRuntime, made_gguf: GgufFiles) -> None:
    """The bindings' own class, one row at a time, and the definition."""
    import numpy as np

    bindings = pytest.importorskip("llama_cpp")
    rows = windows()
    folder, made = made_gguf["F16"]
    plain = bindings.Llama(str(folder / made.open), n_ctx=256, logits_all=True, verbose=False)
    losses = []
    for row in rows:
        plain.reset()
        plain.eval(list(row.input_ids))
        for at, label in enumerate(row.labels):
            if at > 0 and label != IGNORE_INDEX:
                scores = np.asarray(plain.scores[at - 1], dtype=np.float64)
                losses.append(float(np.log(np.exp(scores).sum()) - scores[label]))
    plain.close()
    ours = measure_perplexity(runtime, rows, batch_size=4, window_tokens=None, stride_tokens=None)
    assert ours.num_tokens == len(losses)
    assert ours.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=5e-3)


def test_what_it_takes_is_counted_truly(
    runtime: LlamaCppRuntime, reference: PreTrainedModel, made_gguf: GgufFiles
) -> None:
    num_weights = sum(parameter.numel() for parameter in reference.parameters())
    footprint = runtime.footprint()
    num_norms = sum(p.numel() for p in reference.parameters() if p.ndim == 1)
    assert footprint.parameters == {"F16": num_weights - num_norms, "F32": num_norms}
    assert footprint.memory_bytes == 2 * (num_weights - num_norms) + 4 * num_norms
    folder, made = made_gguf["F16"]
    assert footprint.disk_bytes == (folder / made.open).stat().st_size
    rounded = read_header(find_gguf(made_gguf["Q8_0"][0]))
    assert sum(rounded.parameters.values()) == num_weights
    blocks = (num_weights - num_norms) // 32
    assert rounded.weight_bytes == blocks * 34 + 4 * num_norms


def test_the_tokenizer_is_the_one_beside_the_file(
    runtime: LlamaCppRuntime, loud_llama: Path
) -> None:
    assert runtime.tokenizer.chat_template
    assert runtime.stop_ids >= {runtime.tokenizer.eos_token_id}
    assert runtime.vocab_size == 384


def test_damaged_files_are_told(tmp_path: Path, made_gguf: GgufFiles) -> None:
    folder, made = made_gguf["F16"]
    whole = (folder / made.open).read_bytes()
    with pytest.raises(ModelError, match="holds no GGUF model"):
        LlamaCppRuntime.open(tmp_path)
    (tmp_path / "other.gguf").write_bytes(b"RIFF" + whole[4:])
    with pytest.raises(ModelError, match="is not a GGUF file"):
        LlamaCppRuntime.open(tmp_path / "other.gguf")
    (tmp_path / "short.gguf").write_bytes(whole[:900])
    with pytest.raises(ModelError, match="truncated or damaged"):
        LlamaCppRuntime.open(tmp_path / "short.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole[:-5000])
    with pytest.raises(ModelError, match=r"llama\.cpp cannot load"):
        LlamaCppRuntime.open(tmp_path / "cut.gguf", tokenizer_folder=folder)
    with pytest.raises(ModelError, match="several GGUF models"):
        find_gguf(tmp_path)
