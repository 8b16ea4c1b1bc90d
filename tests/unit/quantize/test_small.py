"""What a library cannot follow is told on a small model, before the source is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from qlora_kit.errors import ModelError
from qlora_kit.model.skeleton import build_skeleton
from qlora_kit.quantize.method import Source
from qlora_kit.quantize.methods import resolve_method
from qlora_kit.quantize.options import parse_options
from qlora_kit.quantize.quantize import Request, prepare, try_beforehand
from qlora_kit.quantize.small import some_text, try_on_small
from qlora_kit.recipe import ModelSpec
from qlora_kit.report.reporter import Reporter

from .one_layer import build, source_of


class Told(Reporter):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return source_of(build(tmp_path_factory.mktemp("small") / "source", "llama"))


def of_kind(source: Source, kind: str, **values: Any) -> Source:
    """A source of real size, of which nothing but the shapes is there."""
    return replace(source, skeleton=build_skeleton(AutoConfig.for_model(kind, **values)))


LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    ("kind", "values"),
    [("llama", LLAMA_8B), ("deepseek_v3", {}), ("gpt_neo", {}), ("recurrent_gemma", {})],
)
def test_a_small_model_has_every_kind_of_module(
    kind: str, values: dict[str, Any], tiny: Source
) -> None:
    """A dense layer and experts, two kinds of attention, recurrent layers; it computes."""
    source = of_kind(tiny, kind, **values)
    seen: list[PreTrainedModel] = []

    def attempt(small: Source, model: PreTrainedModel) -> None:
        with torch.no_grad():
            model(torch.tensor([some_text().sequences[1].input_ids]), use_cache=False)
        assert small.folder == source.folder
        seen.append(model)

    state = torch.random.get_rng_state()
    assert try_on_small(source, attempt) == ""
    assert torch.equal(torch.random.get_rng_state(), state)
    (model,) = seen
    assert sum(one.numel() for one in model.parameters()) < 50_000_000 < source.num_parameters
    kinds = [{type(one) for one in model.modules()} for model in (model, source.skeleton.model)]
    assert kinds[0] == kinds[1]


def test_what_fails_narrow_is_tried_in_its_own_width(tiny: Source) -> None:
    source = of_kind(tiny, "gpt2")
    widths: list[int] = []

    def attempt(small: Source, model: PreTrainedModel) -> None:
        widths.append(model.config.hidden_size)
        if len(widths) == 1:
            raise ModelError("too narrow")

    assert try_on_small(source, attempt) == ""
    assert widths == [128, 768]

    def fail(small: Source, model: PreTrainedModel) -> None:
        raise ModelError(f"cannot follow {model.config.hidden_size}")

    with pytest.raises(ModelError, match="cannot follow 768"):
        try_on_small(source, fail)


def test_what_cannot_be_made_small_is_told(tiny: Source) -> None:
    """Here the tower that sees pictures, which stays as large as it is."""
    method = resolve_method("gptq")
    told = Told()
    try_beforehand(method, of_kind(tiny, "gemma3"), parse_options(method, ()), told)
    (warning,) = told.warned
    assert warning.startswith(
        "gptq: no small model could be made of Gemma3ForConditionalGeneration"
    )


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_llmcompressor_is_tried_beforehand(
    name: str, tiny: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very call, on two layers of a model of 8B."""
    method = resolve_method(name)
    source = of_kind(tiny, "llama", **LLAMA_8B)
    assert method.try_small(source, parse_options(method, ())) == ""

    def stumble(**_: object) -> None:
        raise AttributeError("no attribute 'embed_positions'")

    monkeypatch.setattr("llmcompressor.oneshot", stumble)
    with pytest.raises(ModelError, match="llmcompressor cannot quantize llama: no attribute"):
        method.try_small(source, parse_options(method, ()))


def test_what_torch_cannot_export_is_told_before_the_source_is_measured(tmp_path: Path) -> None:
    folder = build(tmp_path / "mpt", "mpt", d_model=64, n_layers=2, n_heads=4, max_seq_len=128)
    request = Request(ModelSpec(name_or_path=str(folder)), "onnx", tmp_path / "out")
    with pytest.raises(ModelError, match="mpt cannot be exported to ONNX: torch's exporter stops"):
        prepare(request)
    assert [one.name for one in tmp_path.iterdir()] == ["mpt"]
