"""Graphs are the models they were made of, in float32 and in 8 bits, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_sources import SMALL, Kept, build, logits_of, make, windows

from qlora_kit.runtime.onnx import OnnxRuntime


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx-llama") / "source"
    return build(folder, "llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def plain(llama: Path) -> Kept:
    return make(llama, llama.parent / "onnx", "onnx")


@pytest.fixture
def runtime(plain: Kept) -> Iterator[OnnxRuntime]:
    opened = OnnxRuntime.open(plain.folder)
    yield opened
    opened.close()


def test_the_folder_is_whole(plain: Kept) -> None:
    names = {path.name for path in plain.folder.iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"} <= names
    assert "generation_config.json" in names
    assert not {name for name in names if name.endswith((".safetensors", ".py"))}
    assert plain.made.findings["has_cache"] is True
    assert plain.made.findings["max_logit_difference"] < 1e-4


def test_scores_are_those_of_transformers(plain: Kept, runtime: OnnxRuntime) -> None:
    rows = windows()
    model = plain.reference()
    scored = {one.index: one for one in runtime.score(rows, batch_size=2)}
    assert sorted(scored) == [0, 1, 2]
    for index, row in enumerate(rows):
        torch.testing.assert_close(
            scored[index].logits, logits_of(model, row), atol=1e-4, rtol=1e-4
        )
        assert scored[index].targets.tolist() == list(row.input_ids[1:])


def test_answers_are_those_of_transformers(plain: Kept, runtime: OnnxRuntime) -> None:
    """In batches, padded on the left, each alone, and up to the token that ends them."""
    prompts = [row.input_ids for row in windows((7, 3, 11, 1))]
    model = plain.reference()
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        wanted.append(out[0, len(prompt) :].tolist())
    assert runtime.generate(prompts, 12, batch_size=3) == wanted
    assert runtime.generate(prompts, 12, batch_size=1) == wanted
    end = wanted[0][4]
    runtime.stop_ids = frozenset({end})
    stopped = runtime.generate(prompts, 12, batch_size=4)
    assert stopped[0] == wanted[0][: wanted[0].index(end) + 1]
    assert all(end not in answer[:-1] for answer in stopped)


def test_the_footprint_counts_what_is_stored(plain: Kept, runtime: OnnxRuntime) -> None:
    counted = runtime.footprint()
    wanted = sum(parameter.numel() for parameter in plain.reference().parameters())
    assert counted.parameters == {"float32": wanted}
    tied = 4 * SMALL["vocab_size"] * SMALL["hidden_size"]
    assert counted.memory_bytes == pytest.approx(4 * wanted + tied, abs=2048)
    assert counted.disk_bytes > 4 * wanted


@pytest.mark.parametrize("variant", ["int8-dynamic", "int8-static"])
def test_eight_bits_are_near(variant: str, llama: Path, tmp_path: Path) -> None:
    made = make(llama, tmp_path / variant, f"onnx:{variant}")
    assert made.made.findings["num_layers"] == 7
    assert not (made.folder / "float32").exists()
    runtime = OnnxRuntime.open(made.folder)
    linear = 64 * (64 + 32 + 32 + 64 + 3 * 128)
    assert runtime.footprint().parameters["int8"] == linear
    model = made.reference()
    rows = windows()
    for one in runtime.score(rows, batch_size=4):
        wanted = logits_of(model, rows[one.index])
        error = (one.logits - wanted).norm() / wanted.norm()
        assert 1e-5 < error < 0.1
    runtime.close()
