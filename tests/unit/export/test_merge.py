"""The merged folder, loaded by plain transformers, is the model that was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_kit.errors import AdapterError, HardwareError, ModelError, RunError
from qlora_kit.export import merge
from qlora_kit.export.checkpoint import Checkpoint
from qlora_kit.export.merge import merge_adapter, predict_bytes, require_absent, write_dequantized
from qlora_kit.model.weight import dequantized_weight
from qlora_kit.recipe import LoraSpec, QuantizationSpec
from qlora_kit.report.reporter import Reporter

from .tiny_runs import (
    CONFIGS,
    NUM_TOKENS,
    load,
    reload_logits,
    save_fused_model,
    save_model,
    some_ids,
    tune,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

EIGHT_BIT = QuantizationSpec(load_in_4bit=False, load_in_8bit=True)
SIXTEEN_BIT = QuantizationSpec(load_in_4bit=False)


class Heard(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)


def is_tied(folder: Path) -> bool:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_merged_equals_trained(tmp_path: Path, kind: str, use_dora: bool) -> None:
    save_model(tmp_path / "base", CONFIGS[kind]())
    tuned = tune(tmp_path / "base", tmp_path / "adapter", LoraSpec(r=4, use_dora=use_dora))
    result = merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")
    ids = some_ids()
    trained = tuned.logits(ids)
    assert (reload_logits(tmp_path / "merged", ids) - trained).abs().max() < 1e-5
    with tuned.model.disable_adapter():
        assert (tuned.logits(ids) - trained).abs().max() > 0.1, "the adapter says nothing"
    assert result.survival is not None
    assert result.survival.min == pytest.approx(1.0, abs=1e-6)
    assert result.dtype == "float32"
    assert is_tied(tmp_path / "merged") == (kind != "llama") == result.tied
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert names == set(load_file(tmp_path / "base" / "model.safetensors"))


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_a_16_bit_base_has_nothing_to_dequantize(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path / "base", CONFIGS[kind]())
    tuned = tune(tmp_path / "base", tmp_path / "adapter", quantization=SIXTEEN_BIT)
    assert tuned.trained.bases == ("original",)
    with pytest.raises(ModelError, match="was not quantized in training; merge into the original"):
        merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")
    merge_adapter(tuned.trained, "original", tmp_path / "merged")
    ids = some_ids()
    assert (reload_logits(tmp_path / "merged", ids) - tuned.logits(ids)).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_an_8_bit_base_differs_only_by_the_rounding_of_activations(tmp_path: Path) -> None:
    save_model(tmp_path / "base", CONFIGS["llama"]())
    tuned = tune(tmp_path / "base", tmp_path / "adapter", quantization=EIGHT_BIT)
    merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")
    ids = some_ids()
    trained = tuned.logits(ids)
    with tuned.model.disable_adapter():
        effect = (tuned.logits(ids) - trained).abs().max()
    assert (reload_logits(tmp_path / "merged", ids) - trained).abs().max() < effect / 20


def test_a_mixed_base_merges_exactly_but_for_the_rounding_of_activations(tmp_path: Path) -> None:
    save_model(tmp_path / "base", CONFIGS["llama"]())
    mixture = QuantizationSpec(overrides={"down_proj": 8, "v_proj": 8})
    tuned = tune(tmp_path / "base", tmp_path / "adapter", quantization=mixture)
    merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")
    ids = some_ids()
    merged = reload_logits(tmp_path / "merged", ids)
    rounded = (merged - tuned.logits(ids)).abs().max()
    assert compute_from_weights(tuned.model) == 4
    assert (merged - tuned.logits(ids)).abs().max() < min(2e-5, rounded / 100)


def compute_from_weights(model: torch.nn.Module) -> int:
    """Let layers of 8 bits compute with unrounded inputs; returns how many there are."""
    found = [name for name, one in model.named_modules() if isinstance(one, Linear8bitLt)]
    for name in found:
        rounded = model.get_submodule(name)
        plain = torch.nn.Linear(rounded.in_features, rounded.out_features, bias=False)
        plain.weight.data = dequantized_weight(rounded).float()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    return len(found)


def test_the_original_base_keeps_its_16_bit_weights(tmp_path: Path) -> None:
    """original + Δ and dequantized + Δ differ by the quantization error alone."""
    base = save_model(tmp_path / "base", CONFIGS["llama"]()).state_dict()
    tuned = tune(tmp_path / "base", tmp_path / "adapter")
    merge_adapter(tuned.trained, "original", tmp_path / "original")
    merge_adapter(tuned.trained, "dequantized", tmp_path / "dequantized")
    one = load_file(tmp_path / "original" / "model.safetensors")
    other = load_file(tmp_path / "dequantized" / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    layer = tuned.model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(one[name], base[name] + delta, rtol=0, atol=1e-6)
    assert (one[name] - other[name]).abs().max() > 1e-3
    assert torch.equal(one["lm_head.weight"], base["lm_head.weight"])


@pytest.mark.parametrize("tied", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("side", ["head", "embedding", "embedding-lora"])
def test_a_tie_that_training_broke_stays_broken(tmp_path: Path, tied: str, side: str) -> None:
    """PEFT's own merge of a LoRA on a tied embedding changes the head as well."""
    embedding = "wte" if tied == "gpt2" else "embed_tokens"
    spec = {
        "head": LoraSpec(r=4, modules_to_save=("lm_head",)),
        "embedding": LoraSpec(r=4, modules_to_save=(embedding,)),
        "embedding-lora": LoraSpec(r=4, target_modules=(embedding,)),
    }[side]
    save_model(tmp_path / "base", CONFIGS[tied]())
    tuned = tune(tmp_path / "base", tmp_path / "adapter", spec)
    heard = Heard()
    result = merge_adapter(tuned.trained, "dequantized", tmp_path / "merged", reporter=heard)
    ids = some_ids()
    assert (reload_logits(tmp_path / "merged", ids) - tuned.logits(ids)).abs().max() < 1e-5
    assert not result.tied
    assert not is_tied(tmp_path / "merged")
    assert any("were one tensor" in line for line in heard.lines)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "qwen2"])
def test_new_tokens_grow_the_vocabulary(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path / "base", CONFIGS[kind]())
    spec = LoraSpec(r=4, new_tokens=("<left>", "<right>", "<up>"))
    tuned = tune(tmp_path / "base", tmp_path / "adapter", spec)
    merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")
    ids = some_ids(NUM_TOKENS + 3)
    assert (ids >= NUM_TOKENS).any()
    assert (reload_logits(tmp_path / "merged", ids) - tuned.logits(ids)).abs().max() < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("<left> <up>")["input_ids"] == [NUM_TOKENS, NUM_TOKENS + 2]
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.vocab_size == NUM_TOKENS + 3
    assert is_tied(tmp_path / "merged") == (kind != "llama")


def test_new_rows_that_nobody_saved_are_missed(tmp_path: Path) -> None:
    save_model(tmp_path / "base", CONFIGS["llama"]())
    tuned = tune(tmp_path / "base", tmp_path / "adapter")
    tuned.trained.tokenizer.add_tokens(["<new>"])
    with pytest.raises(AdapterError, match="grew from 128 to 129"):
        merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")


def test_embeddings_that_were_saved_whole_are_taken_whole(tmp_path: Path) -> None:
    """What PEFT writes with save_embedding_layers=True."""
    save_model(tmp_path / "base", CONFIGS["llama"]())
    tuned = tune(tmp_path / "base", tmp_path / "adapter", LoraSpec(r=4, new_tokens=("<a>",)))
    shutil.rmtree(tmp_path / "adapter")
    tuned.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("embed_tokens" in name and "delta" not in name for name in stored)
    merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")
    ids = some_ids(NUM_TOKENS + 1)
    assert (reload_logits(tmp_path / "merged", ids) - tuned.logits(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("quantization", [QuantizationSpec(), QuantizationSpec(quant_type="fp4")])
def test_a_base_that_is_stored_quantized(
    tmp_path: Path, kind: str, quantization: QuantizationSpec
) -> None:
    save_model(tmp_path / "dense", CONFIGS[kind]())
    stored = load(tmp_path / "dense", quantization)
    stored.model.save_pretrained(tmp_path / "base")
    stored.tokenizer.save_pretrained(tmp_path / "base")
    tuned = tune(tmp_path / "base", tmp_path / "adapter", quantization=quantization)
    with pytest.raises(ModelError, match="stored quantized"):
        merge_adapter(tuned.trained, "original", tmp_path / "merged")
    merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")
    ids = some_ids()
    assert (reload_logits(tmp_path / "merged", ids) - tuned.logits(ids)).abs().max() < 1e-5
    assert "quantization_config" not in json.loads(
        (tmp_path / "merged" / "config.json").read_text()
    )


def test_many_shards_and_a_prefix_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    save_model(tmp_path / "base", CONFIGS["gpt2"]())
    path = tmp_path / "base" / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # a causal mask, as old checkpoints hold
    save_file(tensors, path, metadata={"format": "pt"})
    tuned = tune(tmp_path / "base", tmp_path / "adapter")
    heard = Heard()
    merge_adapter(
        tuned.trained, "dequantized", tmp_path / "merged", max_shard_bytes=60_000, reporter=heard
    )
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 3
    assert any("h.0.attn.bias" in line for line in heard.lines)
    ids = some_ids()
    assert (reload_logits(tmp_path / "merged", ids) - tuned.logits(ids)).abs().max() < 1e-5
    with Checkpoint(tmp_path / "merged") as checkpoint:
        assert set(checkpoint.names()) == set(tensors) - {"h.0.attn.bias"}


def test_a_base_that_is_fused_on_loading_is_merged_in_memory(tmp_path: Path) -> None:
    save_fused_model(tmp_path / "base")
    tuned = tune(tmp_path / "base", tmp_path / "adapter")
    heard = Heard()
    ids = some_ids()
    for base in tuned.trained.bases:
        merge_adapter(tuned.trained, base, tmp_path / base, reporter=heard)
        names = set(load_file(tmp_path / base / "model.safetensors"))
        assert names == set(load_file(tmp_path / "base" / "model.safetensors"))
    trained = tuned.logits(ids)
    assert (reload_logits(tmp_path / "dequantized", ids) - trained).abs().max() < 1e-5
    assert (reload_logits(tmp_path / "original", ids) - trained).abs().max() > 1e-3
    assert any("merged in memory" in line for line in heard.lines)


def test_a_base_that_is_fused_on_loading_is_dequantized_in_memory(tmp_path: Path) -> None:
    save_fused_model(tmp_path / "base")
    tuned = tune(tmp_path / "base", tmp_path / "adapter")
    heard = Heard()
    folder = write_dequantized(tuned.trained, tmp_path / "dequantized", heard)
    names = set(load_file(folder / "model.safetensors"))
    assert names == set(load_file(tmp_path / "base" / "model.safetensors"))
    ids = some_ids()
    with tuned.model.disable_adapter():
        assert (reload_logits(folder, ids) - tuned.logits(ids)).abs().max() < 1e-5
    assert [line for line in heard.lines if "dequantized in memory" in line] == heard.lines


def test_experts_that_nobody_trained_are_passed_on(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=NUM_TOKENS,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=None,
    )
    save_model(tmp_path / "base", config)
    spec = LoraSpec(r=4, target_modules=("q_proj", "o_proj"))
    tuned = tune(tmp_path / "base", tmp_path / "adapter", spec, SIXTEEN_BIT)
    merge_adapter(tuned.trained, "original", tmp_path / "merged")
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert names == set(load_file(tmp_path / "base" / "model.safetensors"))
    ids = some_ids()
    assert (reload_logits(tmp_path / "merged", ids) - tuned.logits(ids)).abs().max() < 1e-5


def test_rounding_is_once_and_reported(tmp_path: Path) -> None:
    save_model(tmp_path / "base", CONFIGS["llama"](), dtype=torch.bfloat16)
    tuned = tune(tmp_path / "base", tmp_path / "adapter")
    whole = merge_adapter(tuned.trained, "dequantized", tmp_path / "32", dtype="float32")
    auto = merge_adapter(tuned.trained, "dequantized", tmp_path / "16")
    assert (whole.dtype, auto.dtype) == ("float32", "bfloat16")
    exact = load_file(tmp_path / "32" / "model.safetensors")
    rounded = load_file(tmp_path / "16" / "model.safetensors")
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    assert auto.survival is not None
    assert auto.survival.min < 1.0
    assert json.loads((tmp_path / "16" / "config.json").read_text())["dtype"] == "bfloat16"
    assert auto.num_bytes < whole.num_bytes
    assert predict_bytes(tuned.trained, "dequantized") == pytest.approx(auto.num_bytes, rel=0.02)


def test_float16_that_would_overflow_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "base", CONFIGS["llama"]())
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    tuned = tune(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"model\.norm\.weight reaches 1e\+05"):
        merge_adapter(tuned.trained, "original", tmp_path / "merged", dtype="float16")
    assert not (tmp_path / "merged").exists()


def test_quantizing_again_says_what_it_lost(tmp_path: Path) -> None:
    """A light update, of which 4 bits leave next to nothing when they start from their own grid."""
    save_model(tmp_path / "base", CONFIGS["llama"]())
    tuned = tune(tmp_path / "base", tmp_path / "adapter", LoraSpec(r=4, alpha=0.05))
    for base in tuned.trained.bases:
        result = merge_adapter(tuned.trained, base, tmp_path / base, requantize_to="nf4")
        assert result.dtype == "nf4"
        assert result.survival is not None
        layer = AutoModelForCausalLM.from_pretrained(tmp_path / base).model.layers[0].mlp.up_proj
        assert layer.weight.quant_state.quant_type == "nf4"
        if base == "dequantized":
            assert result.survival.median < 0.2


def refuse_room(*_: Any) -> None:
    raise HardwareError("no room")


def test_nothing_is_left_of_a_merge_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "base", CONFIGS["llama"]())
    tuned = tune(tmp_path / "base", tmp_path / "adapter")
    before = sorted(tmp_path.iterdir())

    def break_off(*arguments: Any) -> Iterator[Any]:
        for number, tensor in enumerate(whole(*arguments)):
            if number == 5:
                raise KeyboardInterrupt
            yield tensor

    whole = merge.iterate_dense
    monkeypatch.setattr(merge, "iterate_dense", break_off)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(tuned.trained, "dequantized", tmp_path / "merged", max_shard_bytes=1000)
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr(merge, "require_room", refuse_room)
    with pytest.raises(HardwareError):
        merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(RunError, match="exists already"):
        require_absent(tmp_path / "merged")


def test_what_stands_beside_the_weights(tmp_path: Path) -> None:
    save_model(tmp_path / "base", CONFIGS["llama"]())
    generation = tmp_path / "base" / "generation_config.json"
    values = {**json.loads(generation.read_text()), "eos_token_id": 5, "top_k": 7}
    generation.write_text(json.dumps(values))
    tuned = tune(tmp_path / "base", tmp_path / "adapter")
    merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")
    reloaded = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert reloaded.eos_token_id == [5, 1], "it stops at the tokenizer's own end as well"
    assert (reloaded.top_k, reloaded.temperature, reloaded.do_sample) == (7, 0.7, True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == tuned.trained.tokenizer.chat_template
    assert tokenizer("w1 w2 nothing")["input_ids"] == [6, 7, 0]


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "base", CONFIGS["llama"]())
    tuned = tune(tmp_path / "base", tmp_path / "adapter")
    save_model(tmp_path / "other", CONFIGS["gpt2"]())
    other = load(tmp_path / "other")
    wrong = replace(tuned.trained, source=other.source, skeleton=other.skeleton)
    with pytest.raises(AdapterError, match="belong to no module of this model"):
        merge_adapter(wrong, "dequantized", tmp_path / "merged")
