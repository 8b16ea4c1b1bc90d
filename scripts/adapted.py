"""The model that benches of layers measure: in NF4, with an adapter on all linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def adapted(folder: str | Path, rank: int) -> Any:
    """It computes in float32 and is ready to train."""
    # Behind `plainly`, which hushes what is logged, wherever a bench imports that.
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    from qlora_kit.model.quantized import never_repacked

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    never_repacked(model)
    model.requires_grad_(False)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, lora).train()
