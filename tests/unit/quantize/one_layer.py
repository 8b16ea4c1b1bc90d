"""Tiny random models as sources of a method, and what they become."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.environment import probe_hardware
from qlora_kit.quantize.calibration import CalibrationSpec
from qlora_kit.quantize.held_out import Named
from qlora_kit.quantize.method import Calibration, Made, Source
from qlora_kit.quantize.methods import resolve_method
from qlora_kit.quantize.options import parse_options
from qlora_kit.quantize.quantize import Request, quantize
from qlora_kit.quantize.source import open_source
from qlora_kit.recipe import ModelSpec
from qlora_kit.report.reporter import SILENT

from .tiny_sources import text_file

SMALL: dict[str, Any] = {
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


def build(
    folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **values: object
) -> Path:
    """A model of one layer, whose biases and norms are not the trivial ones of a fresh one."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **values})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Kept:
    """What a method made of a source."""

    source: Source
    folder: Path
    made: Made

    def reference(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.source.folder, dtype=torch.float32).eval()


def source_of(folder: Path) -> Source:
    return open_source(ModelSpec(name_or_path=str(folder)), probe_hardware())


def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(3)
    rows = [
        torch.randint(3, 300, (n,), generator=generator).tolist() for n in (40, 9, 60, 31, 50, 64)
    ]
    return Calibration(
        tuple(TokenSequence(tuple(r), tuple(r), f"text:{i}") for i, r in enumerate(rows)),
        sum(map(len, rows)),
        "random tokens",
    )


def make(folder: Path, draft: Path, name: str, *options: str) -> Kept:
    """By the steps of the straight line, without its measuring."""
    source = source_of(folder)
    method = resolve_method(name)
    chosen = parse_options(method, options)
    method.check(source, chosen)
    needs = method.calibration(chosen) == "required"
    draft.mkdir()
    made = method.make(source, chosen, calibration() if needs else None, draft, SILENT)
    size = sum(path.stat().st_size for path in draft.iterdir())
    assert size <= method.predict_bytes(source, chosen) + 2**20
    return Kept(source, draft, made)


def by_the_line(folder: Path, out: Path, name: str, *options: str) -> tuple[Kept, dict[str, Any]]:
    """What `qlora-kit quantize` publishes, and its certificate."""
    text = str(text_file(out.with_suffix(".jsonl"), 24))
    needs = "static" in name or name in ("gptq", "awq")
    named = Named(text, None) if needs else Named(None, text)
    spec = CalibrationSpec(num_tokens=300 if needs else None, max_length=64)
    request = Request(
        ModelSpec(name_or_path=str(folder)), name, out, options, texts=named, calibration=spec
    )
    certificate = quantize(request)
    assert json.loads((out / "certificate.json").read_text()) == certificate
    made = Made(findings=certificate["findings"], notes=tuple(certificate["notes"]))
    return Kept(source_of(folder), out, made), certificate


def check(folder: Path, name: str, *options: str) -> None:
    """What is refused before any work."""
    method = resolve_method(name)
    method.check(source_of(folder), parse_options(method, options))


def windows(lengths: tuple[int, ...] = (12, 5, 9)) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]
    return [TokenSequence(tuple(r), tuple(r), f"row {i}") for i, r in enumerate(rows)]


def logits_of(model: PreTrainedModel, row: TokenSequence) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1]
