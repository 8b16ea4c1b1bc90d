"""A loop as anybody would write it with transformers and peft."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from train_bench.told import Told, moment
from train_bench.work import Work


def train(work: Work, _: Path) -> Told:
    """All updates, in a loop."""
    torch.set_num_threads(work.threads)
    model = quantized_with_adapter(work)
    trained = [one for one in model.parameters() if one.requires_grad]
    kind = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD}[work.optimizer]
    optimizer = kind(trained, lr=work.learning_rate, weight_decay=0.0)
    model.train()
    told = Told(recomputes="all" if model.is_gradient_checkpointing else "none")
    for rows, supervised in zip(work.updates, work.supervised_tokens, strict=True):
        total = 0.0
        for start in range(0, len(rows), work.batch):
            batch = padded(rows[start : start + work.batch])
            batch = {name: one.to(work.device) for name, one in batch.items()}
            with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16"):
                loss = model(**batch, use_cache=False, num_items_in_batch=supervised).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        told.losses.append(total)
        told.ends.append(moment())
    return told


def quantized_with_adapter(work: Work) -> Any:
    """The base as bitsandbytes quantizes it, with the kit's first values of the adapter."""
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        work.model,
        dtype=dtype,
        device_map={"": work.device} if work.device != "cpu" else None,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    base.requires_grad_(False)
    model = PeftModel.from_pretrained(base, work.adapter, is_trainable=True)
    if work.recompute == "all":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """To the longest of the batch."""
    length = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[list[int]], fill: int) -> Any:
        return torch.tensor([one + [fill] * (length - len(one)) for one in values])

    return {
        "input_ids": filled([row["input_ids"] for row in rows], 0),
        "attention_mask": filled([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": filled([row["labels"] for row in rows], -100),
    }
