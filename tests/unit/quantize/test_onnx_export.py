"""Graphs are the models they were made of, in float32 and in 8 bits, step by step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qlora_kit.errors import ModelError, RecipeError
from qlora_kit.model.companions import copy_companions
from qlora_kit.quantize.layers import quantized_layers
from qlora_kit.quantize.onnx import int8
from qlora_kit.quantize.onnx.make import Int8DynamicOptions, saturation_notes
from qlora_kit.quantize.onnx.saturation import products_saturate
from qlora_kit.runtime.onnx import OnnxRuntime
from qlora_kit.runtime.onnx_weights import stored_weights

from .in_floats import WHOLE, observed_ranges, rounded_to_8_bits
from .one_layer import (
    SMALL,
    Kept,
    build,
    by_the_line,
    calibration,
    check,
    logits_of,
    make,
    windows,
)

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx-llama") / "source"
    return build(folder, "llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def plain(llama: Path) -> Kept:
    kept, certificate = by_the_line(llama, llama.parent / "onnx", "onnx")
    assert certificate["divergence"]["kl_mean"] < 1e-6
    assert certificate["divergence"]["top1_agreement"] == 1
    return kept


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


def test_long_texts_are_read_in_pieces(
    plain: Kept, runtime: OnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the cache from piece to piece, padding on either side."""
    rows = windows((40, 11, 26))
    whole = {one.index: one.logits for one in runtime.score(rows, batch_size=2)}
    answers = runtime.generate([row.input_ids for row in rows], 6, batch_size=3)
    seven_tokens = 4 * runtime.vocab_size * 7
    monkeypatch.setattr("qlora_kit.runtime.onnx.LOGITS_BYTES", 2 * seven_tokens)
    for one in runtime.score(rows, batch_size=2):
        torch.testing.assert_close(one.logits, whole[one.index], atol=1e-4, rtol=1e-4)
    assert runtime.generate([row.input_ids for row in rows], 6, batch_size=3) == answers


def test_the_footprint_counts_what_is_stored(plain: Kept, runtime: OnnxRuntime) -> None:
    counted = runtime.footprint()
    wanted = sum(parameter.numel() for parameter in plain.reference().parameters())
    assert counted.parameters == {"float32": wanted}
    tied = 4 * SMALL["vocab_size"] * SMALL["hidden_size"]
    assert counted.memory_bytes == pytest.approx(4 * wanted + tied, abs=2048)
    assert counted.disk_bytes > 4 * wanted


ROWS = windows((20, 7, 12))
LINEAR = 64 * (64 + 32 + 32 + 64 + 3 * 128)


def test_eight_bits_static(llama: Path, tmp_path: Path) -> None:
    made, certificate = by_the_line(llama, tmp_path / "static", "onnx:int8-static")
    assert 1e-9 < certificate["divergence"]["kl_mean"] < 0.1
    sizes = certificate["footprints"]
    assert sizes["quantized"]["num_parameters"] == sizes["source"]["num_parameters"]
    assert made.made.findings["num_layers"] == 7
    assert not (made.folder / "float32").exists()


def test_static_ranges_are_those_of_the_calibration_text(llama: Path, tmp_path: Path) -> None:
    made = make(llama, tmp_path / "static", "onnx:int8-static")
    names = quantized_layers(made.source.skeleton, ())
    ranges = observed_ranges(made.reference(), names, calibration().sequences)
    require_honest(made.folder, rounded_to_8_bits(made.reference(), names, ranges), made)
    assert parameters_of(made.folder, made) == LINEAR


def test_eight_bits_dynamic_leave_out_what_is_skipped(plain: Kept, tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.{leaf}_proj" for leaf in ("gate", "up")]
    in_8_bits(plain, names, tmp_path / "int8")
    require_honest(tmp_path / "int8", rounded_to_8_bits(plain.reference(), names), plain)
    assert parameters_of(tmp_path / "int8", plain) == 2 * 64 * 128


def test_where_products_saturate_the_whole_range_is_warned_of(llama: Path, tmp_path: Path) -> None:
    """What this machine's products are is asked of the machine, and seen in the logits."""
    made = make(llama, tmp_path / "made", "onnx:int8-dynamic", "reduce_range=false")
    names = quantized_layers(made.source.skeleton, ())
    honest = rounded_to_8_bits(made.reference(), names, largest=WHOLE)
    is_warned = any("cuts off sums" in note for note in made.made.notes)
    assert is_warned == products_saturate()
    assert is_warned == (max(distances(made.folder, honest, made)) > 0.01)


def test_the_default_never_saturates(plain: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.quantize.onnx.saturation.products_saturate", lambda: True)
    assert not list(saturation_notes(Int8DynamicOptions()))
    (note,) = saturation_notes(Int8DynamicOptions(reduce_range=False))
    assert "reduce_range=true" in note


def in_8_bits(plain: Kept, names: list[str], folder: Path) -> None:
    """The float32 graph of a model with these layers quantized, as the method does by default."""
    folder.mkdir()
    copy_companions(plain.source.folder, folder)
    shutil.copyfile(plain.source.folder / "config.json", folder / "config.json")
    graph = plain.folder / "model.onnx"
    nodes = int8.linear_nodes(graph, names)
    reduce_range = Int8DynamicOptions().reduce_range
    int8.quantize_dynamically(graph, folder / "model.onnx", nodes, reduce_range)


def require_honest(folder: Path, calculated: PreTrainedModel, source: Kept) -> None:
    """What is lost is what rounding loses, and nothing else.

    Rounded numbers on the edge of two steps may fall to either side: 1e-6 was measured, and 0.04
    with the weights' range one step off.
    """
    assert max(distances(folder, calculated, source)) < 0.01
    whole = source.reference()
    for row in ROWS:
        wanted, exact = logits_of(calculated, row), logits_of(whole, row)
        assert 1e-3 < (wanted - exact).norm() / exact.norm() < 0.1


def distances(folder: Path, calculated: PreTrainedModel, source: Kept) -> list[float]:
    """Of a graph's logits from these, as shares of the whole model's; one row at a time, as one
    range spans all that is computed at once."""
    runtime = OnnxRuntime.open(folder)
    whole, found = source.reference(), []
    for one in runtime.score(ROWS, batch_size=1):
        row = ROWS[one.index]
        difference = (one.logits - logits_of(calculated, row)).norm()
        found.append(float(difference / logits_of(whole, row).norm()))
    runtime.close()
    return found


def parameters_of(folder: Path, source: Kept) -> int:
    """Of a graph that has as many parameters as the model, how many are integers."""
    runtime = OnnxRuntime.open(folder)
    counted = runtime.footprint()
    runtime.close()
    assert counted.num_parameters == sum(one.numel() for one in source.reference().parameters())
    if source.folder != folder:
        whole = stored_weights(source.folder / "model.onnx").memory_bytes
        saved = whole - counted.memory_bytes
        assert 2.5 * counted.parameters["int8"] < saved, "float32 weights are left behind"
    return counted.parameters["int8"]


def test_layers_that_the_quantizer_passes_over_are_told(plain: Kept, tmp_path: Path) -> None:
    graph = plain.folder / "model.onnx"
    (node,) = int8.linear_nodes(graph, ["model.layers.0.mlp.up_proj"])
    (another,) = int8.linear_nodes(graph, ["model.layers.0.mlp.gate_proj"])
    int8.quantize_dynamically(graph, tmp_path / "model.onnx", [node], True)
    with pytest.raises(ModelError, match="took 1 of the 2 linear layers"):
        int8.require_quantized(graph, tmp_path / "model.onnx", [node, another])


def test_layers_that_are_no_stored_products_are_refused(plain: Kept) -> None:
    with pytest.raises(ModelError, match=r"1 linear layers are no products .*lm_head"):
        int8.linear_nodes(plain.folder / "model.onnx", ["lm_head"])


def test_variants_and_options_are_checked(llama: Path) -> None:
    with pytest.raises(ModelError, match="onnx:int8-dynamic"):
        check(llama, "onnx:int4")
    with pytest.raises(RecipeError, match="activation_range"):
        check(llama, "onnx:int8-static", "activation_range=widest")
    with pytest.raises(ModelError, match="skip_modules: nowhere"):
        check(llama, "onnx:int8-dynamic", "skip_modules=[nowhere]")


def test_fused_experts_stay_in_float32(tmp_path: Path) -> None:
    experts = build(tmp_path / "experts", "qwen3_moe", **EXPERTS)
    with pytest.raises(ModelError, match="experts"):
        check(experts, "onnx:int8-dynamic")
    check(experts, "onnx")


def test_what_is_no_graph_is_told(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ModelError, match=r"has no model\.onnx"):
        OnnxRuntime.open(llama)
    shutil.copytree(llama, tmp_path / "broken")
    (tmp_path / "broken" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match="cannot be loaded"):
        OnnxRuntime.open(tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("qwen2", {"tie_word_embeddings": False}),
        ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 2}),
        ("gpt2", {}),
        ("bloom", {}),
        ("qwen3_moe", EXPERTS),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
def test_other_architectures(kind: str, values: dict[str, Any], tmp_path: Path) -> None:
    """Each is the model it was made of, over more tokens than a sliding window holds."""
    made = make(build(tmp_path / "source", kind, **values), tmp_path / "made", "onnx")
    assert made.made.findings["has_cache"]
    runtime = OnnxRuntime.open(made.folder)
    model = made.reference()
    rows = windows((20, 7))
    for one in runtime.score(rows, batch_size=2):
        wanted = logits_of(model, rows[one.index])
        torch.testing.assert_close(one.logits, wanted, atol=1e-4, rtol=1e-4)
    prompts = [row.input_ids for row in rows]
    wanted_ids = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        wanted_ids.append(out[0, len(prompt) :].tolist())
    assert runtime.generate(prompts, 6, batch_size=2) == wanted_ids
    runtime.close()
    skeleton = made.source.skeleton
    if not skeleton.expert_parameters:
        names = quantized_layers(skeleton, ())
        in_8_bits(made, names, tmp_path / "int8")
        require_honest(tmp_path / "int8", rounded_to_8_bits(made.reference(), names), made)
        linear = [skeleton.model.get_submodule(name) for name in skeleton.linear_modules]
        sizes = sum(one.weight.numel() for one in linear)
        assert parameters_of(tmp_path / "int8", made) == sizes


@pytest.mark.slow
def test_a_model_without_a_plain_cache(tmp_path: Path) -> None:
    """The graph computes each token from the whole text, and says so."""
    folder = build(tmp_path / "source", "lfm2", layer_types=["conv"], num_hidden_layers=1)
    made = make(folder, tmp_path / "made", "onnx")
    assert made.made.findings["has_cache"] is False
    assert any("no cache" in note for note in made.made.notes)
    runtime = OnnxRuntime.open(made.folder)
    model = made.reference()
    (row,) = windows((9,))
    (one,) = runtime.score([row], batch_size=1)
    torch.testing.assert_close(one.logits, logits_of(model, row), atol=1e-4, rtol=1e-4)
    answer = runtime.generate([row.input_ids], 5, batch_size=1)[0]
    ids = list(row.input_ids)
    for token in answer:
        with torch.no_grad():
            assert model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax() == token
        ids.append(token)
    runtime.close()
