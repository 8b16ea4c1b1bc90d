"""Graphs are the models they were made of, in float32 and in 8 bits, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.environment import probe_hardware
from qlora_kit.errors import ModelError, QloraKitError
from qlora_kit.quantize.method import Calibration, Made, Source
from qlora_kit.quantize.methods import resolve_method
from qlora_kit.quantize.options import parse_options
from qlora_kit.quantize.source import open_source
from qlora_kit.recipe import ModelSpec
from qlora_kit.report.reporter import SILENT
from qlora_kit.runtime.onnx import OnnxRuntime

SMALL = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(folder: Path, model_type: str, **values: object) -> Path:
    build_tokenizer(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **values})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Made1:
    source: Source
    folder: Path
    made: Made

    def reference(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.source.folder, dtype=torch.float32).eval()


def source_of(folder: Path) -> Source:
    return open_source(ModelSpec(name_or_path=str(folder)), probe_hardware())


def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (24, 9, 17, 30)]
    return Calibration(
        tuple(TokenSequence(tuple(r), tuple(r), f"text:{i}") for i, r in enumerate(rows)),
        sum(map(len, rows)),
        "random tokens",
    )


def make(folder: Path, draft: Path, name: str, *options: str) -> Made1:
    source = source_of(folder)
    method = resolve_method(name)
    chosen = parse_options(method, options)
    method.check(source, chosen)
    needs = method.calibration(chosen) == "required"
    draft.mkdir()
    made = method.make(source, chosen, calibration() if needs else None, draft, SILENT)
    size = sum(path.stat().st_size for path in draft.iterdir())
    assert size <= method.predict_bytes(source, chosen) + 2**20
    return Made1(source, draft, made)


def windows(lengths: tuple[int, ...] = (12, 5, 9)) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]
    return [TokenSequence(tuple(r), tuple(r), f"row {i}") for i, r in enumerate(rows)]


def logits_of(model: PreTrainedModel, row: TokenSequence) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx-llama") / "source"
    return build(folder, "llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def plain(llama: Path) -> Made1:
    return make(llama, llama.parent / "onnx", "onnx")


@pytest.fixture
def runtime(plain: Made1) -> Iterator[OnnxRuntime]:
    opened = OnnxRuntime.open(plain.folder)
    yield opened
    opened.close()


def test_the_folder_is_whole(plain: Made1) -> None:
    names = {path.name for path in plain.folder.iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"} <= names
    assert "generation_config.json" in names
    assert not {name for name in names if name.endswith((".safetensors", ".py"))}
    assert plain.made.findings["has_cache"] is True
    assert plain.made.findings["max_logit_difference"] < 1e-4


def test_scores_are_those_of_transformers(plain: Made1, runtime: OnnxRuntime) -> None:
    rows = windows()
    model = plain.reference()
    scored = {one.index: one for one in runtime.score(rows, batch_size=2)}
    assert sorted(scored) == [0, 1, 2]
    for index, row in enumerate(rows):
        torch.testing.assert_close(
            scored[index].logits, logits_of(model, row), atol=1e-4, rtol=1e-4
        )
        assert scored[index].targets.tolist() == list(row.input_ids[1:])


def test_answers_are_those_of_transformers(plain: Made1, runtime: OnnxRuntime) -> None:
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


def test_the_footprint_counts_what_is_stored(plain: Made1, runtime: OnnxRuntime) -> None:
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
