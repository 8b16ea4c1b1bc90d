"""Recipes drawn by chance: every option that training depends on, on a tiny model and task."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

_THINGS = ["lamp", "door", "car", "hat", "cup", "pen", "bag", "box"]
_COLOURS = ["red", "green", "blue", "white", "black", "grey", "pink", "brown"]
_OPTIMIZERS = [
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "ademamix_8bit",
    "lion_8bit",
    "rmsprop_bnb_8bit",
    "adagrad",
    "adafactor",
    "sgd",
]
_ADAMS = ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")


def write_case(folder: Path, model: Path, seed: int, **sections: Any) -> Path:
    """A recipe of its own for every seed, with its rows; `sections` are merged into it, or left out
    where they are None.
    """
    random = Random(seed)
    folder.mkdir(parents=True)
    rows = [_row(thing, colour) for thing in _THINGS for colour in _COLOURS]
    random.shuffle(rows)
    (folder / "train.jsonl").write_text("".join(rows[:30]), encoding="utf-8")
    (folder / "more.jsonl").write_text("".join(rows[30:40]), encoding="utf-8")
    (folder / "held-out.jsonl").write_text("".join(rows[40:48]), encoding="utf-8")
    values = draw(random, folder)
    values["model"] = {"name_or_path": str(model)}
    values["run_dir"] = str(folder / "run")
    for name, section in sections.items():
        if section is None:
            values.pop(name, None)
        else:
            values[name] = {**values.get(name, {}), **section}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
    return path


def _row(thing: str, colour: str) -> str:
    turns = [("user", f"paint the {thing} {colour}"), ("assistant", f"{thing}={colour}")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": messages}) + "\n"


def draw(random: Random, folder: Path) -> dict[str, Any]:
    data = _data(random, folder)
    has_eval_rows = "eval" in data or "held_out" in data
    values = {
        "data": data,
        "lora": (lora := _lora(random)),
        "quantization": random.choice([{}, {}, {"load_in_4bit": lora.get("init") == "loftq"}]),
        "train": _train(random, data.get("streaming", False), has_eval_rows),
        "evaluate": {"generate": {"max_new_tokens": 4}}
        if has_eval_rows and random.random() < 0.4
        else {},
        "export": {"merge": has_eval_rows and random.random() < 0.5},
    }
    if random.random() < 0.2:
        _train_on_quantized_weights(random, values)
    return values


def _train_on_quantized_weights(random: Random, values: dict[str, Any]) -> None:
    """Of the adapter, or of the weights themselves, less what has no meaning then."""
    aware = {
        "method": random.choice(["nf4", "int8", "int4-group"]),
        "train": random.choice(["adapter", "full"]),
        "start_after": random.choice([0.0, 0.5]),
    }
    if aware["method"] == "int4-group":
        aware["group_size"] = 32
    if aware["train"] == "full":
        values["lora"] = {}
        values["train"].pop("loraplus_lr_ratio", None)
    else:
        values["lora"] = {"r": 4, "alpha": 8, "init": random.choice(["default", "gaussian"])}
    values["quantization"] = {"load_in_4bit": False}
    values["quantization_aware"] = aware


def _data(random: Random, folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = {
        "train": [{"path": str(folder / "train.jsonl")}],
        "max_length": random.choice([64, 96]),
        "packing": random.random() < 0.3,
        "seed": random.randrange(100),
    }
    kind = random.choice(["eval", "eval", "eval", "held out", "nothing"])
    if kind == "eval":
        data["eval"] = [{"path": str(folder / "held-out.jsonl")}]
    elif kind == "held out":
        data["held_out"] = 0.25
    way = random.choice(["one source", "one source", "two", "mixed", "streamed", "streamed"])
    if way != "one source":
        data["train"].append({"path": str(folder / "more.jsonl")})
    if way == "mixed":
        data["mix"] = "all_exhausted"
        data["train"][0]["weight"] = 3.0
        data["train"][1]["weight"] = 1.0
    data["streaming"] = way == "streamed"
    return data


def _lora(random: Random) -> dict[str, Any]:
    lora: dict[str, Any] = {"r": 4, "alpha": 8, "dropout": random.choice([0.0, 0.1])}
    kind = random.choice(
        ["plain", "plain", "rslora", "modules to save", "new tokens", "dora", "loftq", "gaussian"]
    )
    if kind == "rslora":
        lora["use_rslora"] = True
    elif kind == "modules to save":
        lora["modules_to_save"] = ["lm_head"]
    elif kind == "new tokens":
        lora["new_tokens"] = ["<|one|>"]
    elif kind == "dora":
        lora["use_dora"] = True
    elif kind in ("loftq", "gaussian"):
        lora["init"] = kind
    return lora


def _train(random: Random, is_streamed: bool, has_eval_rows: bool) -> dict[str, Any]:
    optimizer = random.choice(_OPTIMIZERS)
    train: dict[str, Any] = {
        "learning_rate": 1e-2,
        "optim": optimizer,
        "seed": random.randrange(1000),
        "per_device_train_batch_size": random.choice([2, 3, 4]),
        "gradient_accumulation_steps": random.choice([1, 2, 3]),
        "gradient_checkpointing": random.choice([True, False, "auto"]),
        "logging_steps": random.choice([1, 2, 3]),
        "lr_scheduler_type": random.choice(["cosine", "linear", "polynomial"]),
        "warmup_steps": random.choice([0, 2]),
        "neftune_noise_alpha": random.choice([None, None, 5.0]),
        "weight_decay": random.choice([0.0, 0.01]),
    }
    if is_streamed or random.random() < 0.6:
        train["max_steps"] = random.choice([6, 9, 12])
    else:
        train["num_train_epochs"] = random.choice([1.0, 1.5, 2.0])
    if not is_streamed:
        train["train_sampling_strategy"] = random.choice(
            ["random", "random", "sequential", "group_by_length"]
        )
    if optimizer in _ADAMS and random.random() < 0.3:
        train["loraplus_lr_ratio"] = 16.0
    _saving(random, train, has_eval_rows)
    return train


def _saving(random: Random, train: dict[str, Any], has_eval_rows: bool) -> None:
    strategy = random.choice(["steps", "steps", "steps", "epoch", "no"])
    train["save_strategy"] = strategy
    steps = random.choice([1, 2, 3])
    if strategy == "steps":
        train["save_steps"] = steps
    if strategy != "no":
        train["save_total_limit"] = random.choice([1, 2, None])
    if random.random() < 0.15:
        train["report_to"] = ["tensorboard"]
    if random.random() < 0.25:
        train["save_minutes"] = 0.005
    if has_eval_rows and random.random() < 0.5:
        train["eval_strategy"] = strategy if strategy != "no" else "epoch"
        if strategy == "steps":
            train["eval_steps"] = steps
        train["keep_best"] = strategy != "no" and random.random() < 0.6
        if random.random() < 0.3:
            train["warmup_steps"] = 0
            train["lr_scheduler_type"] = "reduce_lr_on_plateau"
            train["lr_scheduler_kwargs"] = {"patience": 0, "factor": 0.5}
