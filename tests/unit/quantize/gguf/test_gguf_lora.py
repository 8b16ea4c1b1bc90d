"""An adapter as GGUF says beside its base what it says in PEFT, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.quantize.gguf.lora import convert_lora, require_expressible
from qlora_kit.quantize.gguf.scripts import LlamaCpp
from qlora_kit.runtime.llama_cpp import LlamaCppRuntime

if TYPE_CHECKING:
    from conftest import GgufFiles

IDS = tuple(torch.randint(3, 270, (40,), generator=torch.Generator().manual_seed(4)).tolist())
ROW = TokenSequence(IDS, IDS, "a row")


def adapt(base: Path, folder: Path, **settings: object) -> torch.Tensor:
    """Save an adapter with random values; what PEFT makes of the row with it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)
    peft: PeftModel = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    peft.save_pretrained(folder)
    with torch.no_grad():
        logits: torch.Tensor = peft.eval()(input_ids=torch.tensor([IDS])).logits[0, :-1]
    return logits


def logits_of(base: Path, lora: Path | None) -> torch.Tensor:
    runtime = LlamaCppRuntime.open(base, lora=lora)
    try:
        (scored,) = runtime.score([ROW], 1)
        return scored.logits
    finally:
        runtime.close()


def kl(expected: torch.Tensor, got: torch.Tensor) -> float:
    one, other = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


def test_every_scale_and_rank_is_kept(
    loud_llama: Path, made_gguf: GgufFiles, llama_scripts: LlamaCpp, tmp_path: Path
) -> None:
    """rsLoRA, with other ranks and alphas for some modules: no GGUF adapter says these."""
    expected = adapt(
        loud_llama,
        tmp_path / "adapter",
        use_rslora=True,
        rank_pattern={"q_proj": 8, "layers.1.mlp.down_proj": 2},
        alpha_pattern={"v_proj": 3, "layers.0.mlp.up_proj": 20},
    )
    target = tmp_path / "adapter.gguf"
    written = convert_lora(llama_scripts, tmp_path / "adapter", loud_llama, target)
    assert (written.num_modules, written.alpha) == (14, 8.0)
    assert written.num_rescaled == 14
    base = made_gguf["F16"][0]
    assert kl(expected, logits_of(base, None)) > 1e-2
    assert kl(expected, logits_of(base, target)) < 1e-4
    folder = tmp_path / "both"
    shutil.copytree(base, folder)
    shutil.copyfile(target, folder / "adapter.gguf")
    assert torch.equal(logits_of(folder, None), logits_of(base, target))
    runtime = LlamaCppRuntime.open(base, lora=target)
    alone = LlamaCppRuntime.open(base)
    try:
        added = runtime.footprint().num_parameters - alone.footprint().num_parameters
    finally:
        runtime.close()
        alone.close()
    matrices = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert added == sum(matrix.numel() for matrix in matrices.values())
    with pytest.raises(ModelError, match="not a model"):
        LlamaCppRuntime.open(target)
    with pytest.raises(ModelError, match="not an adapter"):
        LlamaCppRuntime.open(base, lora=base / "model-F16.gguf")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "trained whole"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "new or retrained tokens"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"target_parameters": ["experts.down_proj"]}, "fused experts"),
    ],
)
def test_what_no_gguf_adapter_can_hold_is_refused(
    tmp_path: Path, setting: dict[str, object], said: str
) -> None:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain))
    assert require_expressible(tmp_path)["r"] == 4
    (tmp_path / "adapter_config.json").write_text(json.dumps({**plain, **setting}))
    with pytest.raises(AdapterError, match=f"{said}.*merge it first"):
        require_expressible(tmp_path)


def test_other_adapters_and_other_matrices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be read"):
        require_expressible(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(AdapterError, match="IA3"):
        require_expressible(tmp_path)


def test_a_matrix_of_no_linear_layer_is_refused(
    loud_llama: Path, llama_scripts: LlamaCpp, tmp_path: Path
) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    matrices = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 384)}
    save_file(matrices, tmp_path / "adapter_model.safetensors")
    target = tmp_path / "out" / "adapter.gguf"
    with pytest.raises(AdapterError, match="lora_embedding_A"):
        convert_lora(llama_scripts, tmp_path, loud_llama, target)
    assert not target.exists()
