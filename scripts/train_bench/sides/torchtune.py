"""torchtune by its recipe for one device, `lora_finetune_single_device`, as `tune run` starts it.

Its configuration names the parts that the recipe takes: the base, which torchtune converts and
quantizes itself, rows that are tokens already, and a log, which takes times and losses. The first
adapter comes in as the checkpoint of a run that has not begun. Its 4-bit format is torchao's, with
other constants than bitsandbytes', so that its losses need not be the others'.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from train_bench.told import Told, moment
from train_bench.work import ALPHA, RANK, Work

HERE = "train_bench.sides.torchtune"
SEED = 0
NF4_BLOCK = 64 * 256
TOLD = Told()
OPTIMIZERS = {"adamw_torch": "torch.optim.AdamW", "sgd": "torch.optim.SGD"}
MODULES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
"""torchtune's names of a Llama's layers."""


def train(work: Work, folder: Path) -> Told:
    """`tune run lora_finetune_single_device --config FILE`, in this process."""
    begun(work, folder / "torchtune")
    settings = configuration(work, folder)
    TOLD.recomputes = "all" if settings["enable_activation_checkpointing"] else "none"
    path = folder / "torchtune.yaml"
    path.write_text(json.dumps(settings))
    (tune,) = entry_points(group="console_scripts", name="tune")
    sys.argv = ["tune", "run", "lora_finetune_single_device", "--config", str(path)]
    try:
        tune.load()()
    except SystemExit as ended:  # how the recipe returns
        if ended.code:
            raise
    return TOLD


def configuration(work: Work, folder: Path) -> dict[str, Any]:
    """What would stand in the YAML file of `tune run`. The recipe's default recomputes nothing."""
    return {
        "output_dir": str(folder / "torchtune"),
        "model": architecture(Path(work.model), work.longest),
        "tokenizer": {"_component_": f"{HERE}.padding"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": work.model,
            "checkpoint_files": sorted(one.name for one in Path(work.model).glob("*.safetensors")),
            "adapter_checkpoint": "first_adapter.pt",
            "recipe_checkpoint": "recipe_state.pt",
            "output_dir": str(folder / "torchtune"),
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": True,
        "save_adapter_weights_only": True,
        "dataset": {"_component_": f"{HERE}.rows", "path": str(folder / "work.json")},
        "seed": SEED,
        "shuffle": False,
        "batch_size": work.batch,
        "optimizer": {
            "_component_": OPTIMIZERS[work.optimizer],
            "lr": work.learning_rate,
            "weight_decay": 0.0,
        },
        "lr_scheduler": {"_component_": f"{HERE}.constant"},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "epochs": 1,
        "max_steps_per_epoch": len(work.updates),
        "gradient_accumulation_steps": work.accumulation,
        "clip_grad_norm": 1.0,
        "compile": False,
        "metric_logger": {"_component_": f"{HERE}.Log"},
        "device": work.device,
        "dtype": work.precision,
        "enable_activation_checkpointing": work.recompute == "all",
    }


def objection(model: Path) -> str | None:
    """Why torchtune cannot train this base in 4 bits; None where it can.

    torchao's NF4 wants the weights of each layer to be whole blocks of blocks, 64 × 256 of them.
    """
    known = json.loads((model / "config.json").read_text())
    rope = known.get("rope_parameters") or {}
    if known["model_type"] != "llama" or rope.get("rope_type", "default") != "default":
        return "torchtune's side knows a Llama without scaled positions only"
    hidden, heads = known["hidden_size"], known["num_attention_heads"]
    of_keys = hidden // heads * known["num_key_value_heads"]
    for wide in (hidden, of_keys, known["intermediate_size"]):
        if hidden * wide % NF4_BLOCK:
            return (
                f"torchtune cannot quantize a layer of {hidden} × {wide} weights: its NF4 wants "
                f"multiples of {NF4_BLOCK:,}"
            )
    return None


def architecture(model: Path, longest: int) -> dict[str, Any]:
    """torchtune's builder with the numbers of a base's `config.json`."""
    known = json.loads((model / "config.json").read_text())
    rope = known.get("rope_parameters") or {}
    return {
        "_component_": "torchtune.models.llama3_2.lora_llama3_2",
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "quantize_base": True,
        "vocab_size": known["vocab_size"],
        "num_layers": known["num_hidden_layers"],
        "num_heads": known["num_attention_heads"],
        "num_kv_heads": known["num_key_value_heads"],
        "embed_dim": known["hidden_size"],
        "intermediate_dim": known["intermediate_size"],
        "max_seq_len": longest,
        "norm_eps": known["rms_norm_eps"],
        "rope_base": rope.get("rope_theta") or known["rope_theta"],
        "scale_factor": 1,
        "tie_word_embeddings": known["tie_word_embeddings"],
    }


def begun(work: Work, folder: Path) -> None:
    """Write the checkpoint of a run before its first update: the adapter, and an empty state."""
    import torch
    from safetensors.torch import load_file

    folder.mkdir(exist_ok=True)
    adapter = load_file(Path(work.adapter) / "adapter_model.safetensors")
    torch.save({tune_name(key): one for key, one in adapter.items()}, folder / "first_adapter.pt")
    state = {
        "epochs_run": 0,
        "seed": SEED,
        "total_epochs": 1,
        "max_steps_per_epoch": len(work.updates),
        "optimizer": {},
        "dataloader": {},
    }
    torch.save(state, folder / "recipe_state.pt")


def tune_name(key: str) -> str:
    """torchtune's name of an adapter's tensor, by PEFT's. The rows of q and k that torchtune
    permutes are those of lora_B, which is zero before the first update.
    """
    found = re.fullmatch(r"base_model\.model\.model\.(layers\.\d+)\.(.+)\.lora_([AB])\.weight", key)
    if found is None:
        raise ValueError(f"{key} is no tensor of a Llama's LoRA.")
    layer, module, half = found.groups()
    return f"{layer}.{MODULES[module]}.lora_{half.lower()}.weight"


def padding() -> SimpleNamespace:
    """What the recipe asks of a tokenizer where rows are tokens already."""
    return SimpleNamespace(pad_id=0)


def rows(_tokenizer: Any, path: str) -> list[dict[str, list[int]]]:
    """The work's rows, by torchtune's names."""
    work = Work(**json.loads(Path(path).read_text()))
    return [{"tokens": one["input_ids"], "labels": one["labels"]} for one in work.rows]


def constant(optimizer: Any, num_training_steps: int, last_epoch: int) -> Any:
    """A learning rate that stays."""
    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, lambda _: 1.0)


class Log:
    """A metric logger of the recipe's that fills in `TOLD`."""

    def log_config(self, config: Any) -> None:
        """Nothing: the configuration is ours."""

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        """One update has ended."""
        TOLD.ends.append(moment())
        TOLD.losses.append(float(payload["loss"]))

    def close(self) -> None:
        """Nothing to close."""
