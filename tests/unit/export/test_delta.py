"""An adapter's updates are PEFT's own, and none of its tensors is lost."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_kit.errors import AdapterError
from qlora_kit.export.checkpoint import Checkpoint
from qlora_kit.export.delta import merge_lora, read_adapter, survival
from qlora_kit.export.dense import iterate_dense
from qlora_kit.export.merge import merge_adapter
from qlora_kit.export.names import map_names
from qlora_kit.model.skeleton import Skeleton, build_skeleton, load_config
from qlora_kit.recipe import LoraSpec, QuantizationSpec

from .tiny_runs import CONFIGS, NUM_TOKENS, Tuned, save_model, shake, tune

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {},
    "head": {"modules_to_save": ("lm_head",)},
    "norm": {},
    "tokens": {"new_tokens": ("<a>", "<b>")},
}
# What the two families call otherwise.
LLAMA_VARIANTS = {
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"1\.mlp\.down_proj": 8},
        "alpha_pattern": {"layers.0.self_attn.o_proj": 7},
    },
    "norm": {"modules_to_save": ("norm",)},
}
GPT2_VARIANTS = {
    "patterns": {
        "rank_pattern": {"c_attn": 2, r"1\.mlp\.c_proj": 8},
        "alpha_pattern": {"h.0.attn.c_proj": 7},
    },
    "norm": {"modules_to_save": ("ln_f",)},
}


def merge_whole_model(tuned: Tuned) -> dict[str, torch.Tensor]:
    """PEFT's merge of the whole model, on the dequantized base in float32."""
    skeleton, trained = tuned.base.skeleton, tuned.trained
    dense = AutoModelForCausalLM.from_pretrained(trained.source.folder, dtype=torch.float32)
    with Checkpoint(trained.source.folder) as checkpoint, torch.no_grad():
        names = map_names(skeleton, checkpoint.names(), ())
        for one in iterate_dense(checkpoint, names, skeleton, trained.as_trained):
            dense.get_parameter(str(one.parameter)).copy_(one.value)
    if len(trained.tokenizer) > NUM_TOKENS:
        dense.resize_token_embeddings(len(trained.tokenizer))
    merged = PeftModel.from_pretrained(dense, str(trained.folder)).merge_and_unload()
    return merged.state_dict()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_module_by_module_equals_the_whole_model(tmp_path: Path, kind: str, variant: str) -> None:
    named = (GPT2_VARIANTS if kind == "gpt2" else LLAMA_VARIANTS).get(variant, {})
    spec = LoraSpec(r=4, **VARIANTS[variant], **named)
    save_model(tmp_path / "base", CONFIGS[kind]())
    tuned = tune(tmp_path / "base", tmp_path / "adapter", spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    whole = merge_whole_model(tuned)
    for name, value in stored.items():
        assert value.shape == whole[name].shape
        torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-6, msg=name)
    untouched = load_file(tmp_path / "base" / "model.safetensors")
    changed = [
        n
        for n, v in stored.items()
        if n in untouched and v.shape == untouched[n].shape and not torch.equal(v, untouched[n])
    ]
    assert len(changed) >= 8


def adapter_on_disk(folder: Path, skeleton: Skeleton, **options: Any) -> Path:
    """An adapter made by PEFT alone, on the unquantized model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    tuned = get_peft_model(model, LoraConfig(**options))
    shake(tuned)
    out = folder.with_name("plain-adapter")
    tuned.save_pretrained(out, save_embedding_layers=False)
    return out


@pytest.fixture
def base_and_skeleton(tmp_path: Path) -> tuple[Path, Skeleton]:
    save_model(tmp_path / "base", CONFIGS["qwen2"]())
    return tmp_path / "base", build_skeleton(load_config(tmp_path / "base"))


def test_the_base_weight_is_left_as_it_is(base_and_skeleton: tuple[Path, Skeleton]) -> None:
    folder, skeleton = base_and_skeleton
    adapter = read_adapter(adapter_on_disk(folder, skeleton), skeleton)
    weight = torch.randn(64, 64)
    before = weight.clone()
    merged = merge_lora(adapter, "model.layers.0.self_attn.q_proj", skeleton, weight)
    assert torch.equal(weight, before)
    assert not torch.equal(merged, before)


def test_an_update_of_the_bias_is_added(
    base_and_skeleton: tuple[Path, Skeleton], tmp_path: Path
) -> None:
    """Qwen2's projections have biases, and `lora_bias` trains them too."""
    folder, skeleton = base_and_skeleton
    adapter_folder = adapter_on_disk(folder, skeleton, lora_bias=True)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    whole = PeftModel.from_pretrained(dense, str(adapter_folder)).merge_and_unload().state_dict()
    tuned = tune(folder, tmp_path / "unused")
    trained = replace(
        tuned.trained, folder=adapter_folder, quantization=QuantizationSpec(load_in_4bit=False)
    )
    merge_adapter(trained, "original", tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.bias"
    assert not torch.equal(stored[name], base[name])
    for name, value in stored.items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-6, msg=name)


def rewrite(folder: Path, **extra: torch.Tensor | None) -> None:
    """Add tensors to an adapter; None takes one away."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in extra.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


PREFIX = "base_model.model.model.layers"


def test_tensors_of_another_model_are_named(base_and_skeleton: tuple[Path, Skeleton]) -> None:
    folder, skeleton = base_and_skeleton
    adapter = adapter_on_disk(folder, skeleton)
    rewrite(adapter, **{f"{PREFIX}.7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)})
    with pytest.raises(AdapterError, match=r"layers\.7\.self_attn\.q_proj\.lora_A\.weight belong"):
        read_adapter(adapter, skeleton)


def test_tensors_that_the_config_does_not_explain_are_named(
    base_and_skeleton: tuple[Path, Skeleton],
) -> None:
    folder, skeleton = base_and_skeleton
    folder_of_adapter = adapter_on_disk(folder, skeleton)
    rewrite(
        folder_of_adapter,
        **{f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(64)},
    )
    adapter = read_adapter(folder_of_adapter, skeleton)
    with pytest.raises(AdapterError, match="lora_magnitude_vector"):
        merge_lora(adapter, "model.layers.0.self_attn.q_proj", skeleton, torch.zeros(64, 64))


def test_half_an_update_is_refused(base_and_skeleton: tuple[Path, Skeleton]) -> None:
    folder, skeleton = base_and_skeleton
    folder_of_adapter = adapter_on_disk(folder, skeleton)
    rewrite(folder_of_adapter, **{f"{PREFIX}.0.self_attn.q_proj.lora_B.weight": None})
    adapter = read_adapter(folder_of_adapter, skeleton)
    with pytest.raises(AdapterError, match=r"q_proj is not what .*lora_B"):
        merge_lora(adapter, "model.layers.0.self_attn.q_proj", skeleton, torch.zeros(64, 64))


def test_another_rank_than_the_config_says_is_refused(
    base_and_skeleton: tuple[Path, Skeleton],
) -> None:
    folder, skeleton = base_and_skeleton
    folder_of_adapter = adapter_on_disk(folder, skeleton)
    set_config(folder_of_adapter, r=8)
    adapter = read_adapter(folder_of_adapter, skeleton)
    with pytest.raises(AdapterError, match=r"q_proj does not fit: .*size mismatch"):
        merge_lora(adapter, "model.layers.0.self_attn.q_proj", skeleton, torch.zeros(64, 64))


def test_an_update_that_is_not_finite_is_refused(
    base_and_skeleton: tuple[Path, Skeleton],
) -> None:
    folder, skeleton = base_and_skeleton
    folder_of_adapter = adapter_on_disk(folder, skeleton)
    bad = torch.full((64, 4), math.nan)
    rewrite(folder_of_adapter, **{f"{PREFIX}.0.self_attn.q_proj.lora_B.weight": bad})
    adapter = read_adapter(folder_of_adapter, skeleton)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj: NaNs"):
        merge_lora(adapter, "model.layers.0.self_attn.q_proj", skeleton, torch.zeros(64, 64))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "LOHA"}, "is a LOHA adapter; only LoRA is merged"),
        ({"init_lora_weights": "pissa"}, "moves a part of the base into the adapter"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "repeats layers"),
        ({"alora_invocation_tokens": [1, 2]}, "acts only after certain tokens"),
    ],
)
def test_what_cannot_be_merged_faithfully_is_refused(
    base_and_skeleton: tuple[Path, Skeleton], values: dict[str, Any], words: str
) -> None:
    folder, skeleton = base_and_skeleton
    adapter = adapter_on_disk(folder, skeleton)
    set_config(adapter, **values)
    with pytest.raises(AdapterError, match=words):
        read_adapter(adapter, skeleton)


def test_missing_and_damaged_files_are_named(
    base_and_skeleton: tuple[Path, Skeleton], tmp_path: Path
) -> None:
    folder, skeleton = base_and_skeleton
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path, skeleton)
    adapter = adapter_on_disk(folder, skeleton)
    config = adapter / "adapter_config.json"
    text = config.read_text()
    config.write_text(text[:40])
    with pytest.raises(AdapterError, match=r"adapter_config\.json cannot be read"):
        read_adapter(adapter, skeleton)
    config.write_text(text)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AdapterError, match="damaged"):
        read_adapter(adapter, skeleton)
    weights.unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        read_adapter(adapter, skeleton)


def test_survival_is_the_projection_onto_the_update() -> None:
    base = torch.tensor([1.0, 2.0, 3.0])
    delta = torch.tensor([0.0, 1.0, 1.0])
    assert survival(delta, base + delta, base) == pytest.approx(1.0)
    assert survival(delta, base, base) == 0.0
    assert survival(delta, base + 0.25 * delta, base) == pytest.approx(0.25)
    assert survival(delta, base + torch.tensor([9.0, 1.0, 1.0]), base) == pytest.approx(1.0)
    assert survival(torch.zeros(3), base + 1, base) == 1.0


def test_rounding_to_bfloat16_swallows_a_light_update_of_a_bfloat16_base() -> None:
    """Why the share is reported: neighbours of 1 in bfloat16 are 2^-8 and 2^-7 away."""
    base = torch.ones(1000)
    delta = torch.full((1000,), 2.0**-10)
    assert survival(delta, (base + delta).bfloat16(), base) == 0.0
    assert survival(delta, (base + delta).half(), base) == pytest.approx(1.0)
