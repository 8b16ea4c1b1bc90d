"""The sides that are compared: how each does the work. Runs in a process of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_bench.work import RATE, Work

Ends = list[tuple[float, float]]
"""Of each update: the time, and the CPU seconds of the process so far."""


def moment() -> tuple[float, float]:
    """The time, and the CPU seconds of this process so far."""
    return time.time(), time.process_time()


def run_side(side: str, folder: Path) -> int:
    """In the child."""
    work = Work(**json.loads((folder / "work.json").read_text()))
    losses, ends = SIDES[side](work, folder)
    (folder / f"{side}.json").write_text(json.dumps({"losses": losses, "ends": ends}))
    return 0


def by_kit(work: Work, folder: Path) -> tuple[list[float], Ends]:
    """`qlora-kit train`, from the recipe to the end of training."""
    import shutil

    import torch

    from qlora_kit.recipe import load_recipe
    from qlora_kit.report.reporter import Progress, Reporter
    from qlora_kit.run import run_recipe

    ends: Ends = []

    class Clock(Progress):
        def update(self, advance: int = 1, **fields: str) -> None:
            ends.append(moment())

    class Listening(Reporter):
        def progress(self, name: str, total: int) -> Any:
            from contextlib import nullcontext

            return nullcontext(Clock() if name == "training" else Progress())

        def say(self, text: str) -> None:
            print(text, flush=True)

    torch.set_num_threads(work.threads)
    shutil.rmtree(folder / "run", ignore_errors=True)
    run_recipe(load_recipe(folder / "recipe.yaml"), Listening())
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").open()]
    return [line["loss"] for line in lines if "loss" in line], ends


def by_plain(work: Work, _: Path) -> tuple[list[float], Ends]:
    """A loop as anybody would write it with transformers and peft."""
    import torch

    torch.set_num_threads(work.threads)
    model = quantized_with_adapter(work)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    model.train()
    losses: list[float] = []
    ends: Ends = []
    for rows, supervised in zip(work.updates, work.supervised_tokens, strict=True):
        total = 0.0
        for start in range(0, len(rows), work.batch):
            batch = padded(rows[start : start + work.batch])
            with torch.autocast("cpu", torch.bfloat16, enabled=work.precision == "bf16"):
                loss = model(**batch, use_cache=False, num_items_in_batch=supervised).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        ends.append(moment())
    return losses, ends


def by_trl(work: Work, folder: Path) -> tuple[list[float], Ends]:
    """TRL's SFTTrainer, whose adapter is put back to float32 so that losses can be compared."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(work.threads)
    ends: Ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(moment())

    rows = Dataset.from_list([row for update in work.updates for row in update])
    trainer = SFTTrainer(
        model=quantized_with_adapter(work),
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=work.batch,
            gradient_accumulation_steps=work.accumulation,
            max_steps=len(work.updates),
            learning_rate=RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            optim="adamw_torch",
            max_length=None,
            logging_steps=1,
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            bf16=work.precision == "bf16",
            use_cpu=True,
            gradient_checkpointing=work.recompute == "all",
            train_sampling_strategy="sequential",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(work.model),
        callbacks=[Clock()],
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], ends


def quantized_with_adapter(work: Work) -> Any:
    """The base as bitsandbytes quantizes it, with the kit's first values of the adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        work.model,
        dtype=dtype,
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
    import torch

    length = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[list[int]], fill: int) -> Any:
        return torch.tensor([one + [fill] * (length - len(one)) for one in values])

    return {
        "input_ids": filled([row["input_ids"] for row in rows], 0),
        "attention_mask": filled([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": filled([row["labels"] for row in rows], -100),
    }


SIDES = {"kit": by_kit, "plain": by_plain, "trl": by_trl}
