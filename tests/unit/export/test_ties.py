"""Which parameters share one tensor after the merge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_kit.export.checkpoint import Checkpoint
from qlora_kit.export.merge import MergeResult, merge_adapter
from qlora_kit.export.names import map_names
from qlora_kit.export.ties import Ties, resolve_ties
from qlora_kit.model.skeleton import build_skeleton, load_config
from qlora_kit.recipe import QuantizationSpec

from .tiny_runs import CONFIGS, reload_logits, save_model, shake, some_ids, tune

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def ties_of(folder: Path) -> Ties:
    skeleton = build_skeleton(load_config(folder))
    with Checkpoint(folder) as checkpoint:
        names = map_names(skeleton, checkpoint.names(), ())
        return resolve_ties(skeleton, checkpoint, names, None)


def test_a_repeated_head_is_a_duplicate_where_it_is_equal(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["llama-tied"]())
    assert ties_of(tmp_path).kept == (("lm_head.weight", "model.embed_tokens.weight"),)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    found = ties_of(tmp_path)
    assert found.duplicates == {"lm_head.weight"}
    assert found.config_ties
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    found = ties_of(tmp_path)
    assert found.apart
    assert not found.config_ties
    assert not found.duplicates


@pytest.mark.parametrize("difference", [0.0, 0.1])
def test_a_head_stored_beside_its_tie(tmp_path: Path, difference: float) -> None:
    """Equal, it is written once; different, the base was never tied, and stays so."""
    save_model(tmp_path / "base", CONFIGS["llama-tied"]())
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + difference
    save_file(tensors, path, metadata={"format": "pt"})
    tuned = tune(tmp_path / "base", tmp_path / "adapter")
    result = merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")
    ids = some_ids()
    assert (reload_logits(tmp_path / "merged", ids) - tuned.logits(ids)).abs().max() < 1e-5
    assert result.tied == (difference == 0.0)
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) == (
        difference != 0.0
    )


def test_a_checkpoint_that_holds_only_the_head(tmp_path: Path) -> None:
    save_model(tmp_path / "base", CONFIGS["llama-tied"]())
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    tuned = tune(tmp_path / "base", tmp_path / "adapter")
    merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")
    ids = some_ids()
    assert (reload_logits(tmp_path / "merged", ids) - tuned.logits(ids)).abs().max() < 1e-5


def merge_plain(tmp_path: Path, **options: Any) -> tuple[MergeResult, float]:
    """Merge what PEFT alone trained on a tied model; the result, and how far off it is."""
    save_model(tmp_path / "base", CONFIGS["llama-tied"]())
    tuned = tune(
        tmp_path / "base", tmp_path / "unused", quantization=QuantizationSpec(load_in_4bit=False)
    )
    model: PeftModel = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, task_type="CAUSAL_LM", **options),
    )
    shake(model)
    model.eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    trained = replace(tuned.trained, folder=tmp_path / "adapter")
    result = merge_adapter(trained, "original", tmp_path / "merged")
    ids = some_ids()
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    return result, float((reload_logits(tmp_path / "merged", ids) - wanted).abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["lora", "replaced"],
)
def test_weights_that_peft_keeps_tied_stay_tied(tmp_path: Path, options: dict[str, Any]) -> None:
    result, error = merge_plain(tmp_path, ensure_weight_tying=True, **options)
    assert error < 1e-5
    assert result.tied


def test_a_lora_on_both_sides_of_a_tie(tmp_path: Path) -> None:
    result, error = merge_plain(tmp_path, target_modules=["embed_tokens", "lm_head"])
    assert error < 1e-5
    assert not result.tied


@pytest.mark.parametrize("head", [[3, 4], [5]], ids=["same", "other"])
def test_rows_trained_on_both_sides_of_a_tie(tmp_path: Path, head: list[int]) -> None:
    """PEFT keeps the tie where both sides name the same tokens."""
    indices = {"embed_tokens": [3, 4], "lm_head": head}
    result, error = merge_plain(
        tmp_path, target_modules=["q_proj"], trainable_token_indices=indices
    )
    assert error < 1e-5
    assert result.tied == (head == [3, 4])
