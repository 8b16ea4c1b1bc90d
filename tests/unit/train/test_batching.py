"""How sequences become batches, and that packing changes no gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from qlora_kit.data.collate import Collator, IsolatingCollator
from qlora_kit.data.ledger import Ledger
from qlora_kit.data.pack import PackedSequence
from qlora_kit.data.prepare import Part
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.errors import ModelError
from qlora_kit.model.base import Base
from qlora_kit.recipe import (
    DataSpec,
    Recipe,
    SourceSpec,
    recipe_from_dict,
)
from qlora_kit.run import run_recipe
from qlora_kit.train.batching import Batching, plan_batches
from qlora_kit.train.isolation import Leakage, measure_leakage


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Base:
    return load_tiny(tiny_llama)


def sequences(*lengths: int) -> list[TokenSequence]:
    generator = np.random.default_rng(3)
    made = []
    for number, length in enumerate(lengths):
        ids = generator.integers(3, 290, length).tolist()
        labels = [IGNORE_INDEX] * (length // 2) + ids[length // 2 :]
        made.append(TokenSequence(tuple(ids), tuple(labels), f"rows.jsonl:{number + 1}"))
    return made


def plan(
    base: Base, kernel: str | None = None, adapted: torch.nn.Module | None = None, **values: Any
) -> Batching:
    spec = DataSpec(train=(SourceSpec(path="rows.jsonl"),), max_length=32, **values)
    model = base.model
    if kernel is not None:
        model = WithKernel(model, kernel)
    train, held_out = Part((), sequences(10, 20, 12, 5, 32), Ledger()), sequences(7, 9)
    return plan_batches(adapted or model, replace(base, model=model), train, held_out, spec)


class WithKernel(torch.nn.Module):
    """The model under another name for its attention, which this machine need not have."""

    def __init__(self, model: torch.nn.Module, kernel: str):
        super().__init__()
        self.model = model
        self.config = type("Config", (), {"_attn_implementation": kernel})()

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def test_without_padding_where_nothing_else_is_said(base: Base) -> None:
    """On a CPU, where torch's SDPA is given each example by itself."""
    batching = plan(base)
    assert isinstance(batching.collator, IsolatingCollator)
    assert batching.collator.flatten
    assert batching.by_example
    assert [one.num_tokens for one in batching.train] == [10, 20, 12, 5, 32]
    assert batching.description == "without padding (each example by itself)"


def test_padded_where_attention_is_computed_otherwise(base: Base) -> None:
    base.model.set_attn_implementation("eager")
    try:
        batching = plan(base)
    finally:
        base.model.set_attn_implementation("sdpa")
    assert isinstance(batching.collator, Collator)
    assert not batching.by_example
    assert batching.description == (
        "padded to the longest of each: the attention of llama (eager) takes no examples one by one"
    )
    asked = plan(base, padding_free=False).description
    assert asked == "padded to the longest of each: data.padding_free: false"


def test_packed(base: Base) -> None:
    batching = plan(base, packing=True)
    assert isinstance(batching.collator, IsolatingCollator)
    assert not batching.collator.flatten
    assert all(isinstance(one, PackedSequence) for one in batching.train)
    assert [one.num_tokens for one in batching.train] == [32, 32, 15]
    assert [one.num_tokens for one in batching.held_out] == [16]
    assert batching.description.startswith("5 examples packed into 3 sequences of 32 tokens")


def test_of_packed_rows_the_longest_example_counts(base: Base) -> None:
    """Not the row that it is packed into; and of those alone that are short enough."""
    for packing in (True, False):
        batches = plan(base, packing=packing)
        assert batches.by_example
        assert batches.longest_by_itself(100) == 32
        assert batches.longest_by_itself(31) == 20, "12, 10 and 5 are packed to 27"
        assert batches.longest_by_itself(4) == 0
        assert replace(batches, by_example=False).longest_by_itself(100) == 0


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_without_padding_where_the_kernel_can(base: Base, kernel: str) -> None:
    batching = plan(base, kernel)
    assert isinstance(batching.collator, IsolatingCollator)
    assert batching.collator.flatten
    assert len(batching.train) == 5
    assert batching.description == f"without padding ({kernel})"


def test_without_padding_on_any_kernel_where_it_is_asked_for(base: Base) -> None:
    batching = plan(base, padding_free=True)
    assert isinstance(batching.collator, IsolatingCollator)
    assert batching.collator.flatten
    assert isinstance(plan(base, "flash_attention_2", padding_free=False).collator, Collator)


def test_a_model_that_leaks_is_padded_or_refused(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without packing nobody asked for it, so padding will do; with packing it stops."""
    leaks = Leakage(0.5, 1e-3)
    monkeypatch.setattr("qlora_kit.train.batching.measure_leakage", lambda *_: leaks)
    padded = plan(base)
    assert isinstance(padded.collator, Collator)
    assert "see each other (it moves a logit by 50.0% of their range" in padded.description
    assert isinstance(plan(base, "flash_attention_2").collator, Collator)
    with pytest.raises(ModelError, match=r"data\.packing"):
        plan(base, packing=True)
    with pytest.raises(ModelError, match=r"data\.padding_free"):
        plan(base, padding_free=True)


ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"turn lamp {n} to {n * 10} percent" * (1 + n % 3)},
            {"role": "assistant", "content": '{"lamp":' + "7" * (n % 4) + "}"},
        ]
    }
    for n in range(8)
]


def recipe_of(folder: Path, model: Path, packing: bool, batch_size: int) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {
        "model": {"name_or_path": str(model)},
        "data": {"train": [{"path": str(rows)}], "max_length": 128, "packing": packing},
        "lora": {"r": 4, "alpha": 8},
        "quantization": {"compute_dtype": "float32"},
        "train": {
            "optim": "sgd",
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "max_grad_norm": 0.0,
            "max_steps": 2,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": 1,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "precision": "fp32",
        },
        "export": {"merge": False},
        "run_dir": str(folder / "run"),
    }
    return recipe_from_dict(values, "test")


@pytest.mark.parametrize("how", ["packing", "padding_free"])
def test_training_packed_is_training_padded(tmp_path: Path, tiny_llama: Path, how: str) -> None:
    """All examples in each step, so loss and gradients are the same sums, packed or padded."""
    recipe = recipe_of(tmp_path / "padded", tiny_llama, False, 8)
    data = recipe.data.model_copy(update={"padding_free": False})
    padded = run_recipe(recipe.model_copy(update={"data": data}))
    recipe = recipe_of(tmp_path / "packed", tiny_llama, False, 8)
    data = recipe.data.model_copy(update={how: True})
    packed = run_recipe(recipe.model_copy(update={"data": data}))
    assert packed is not None
    assert padded is not None
    if how == "padding_free":
        assert packed.trained.num_padding_tokens == 0
    assert packed.trained.num_tokens == padded.trained.num_tokens
    assert packed.trained.num_padding_tokens < padded.trained.num_padding_tokens
    assert packed.trained.first_loss == pytest.approx(padded.trained.first_loss, rel=1e-5)
    assert packed.trained.last_loss == pytest.approx(padded.trained.last_loss, rel=1e-5)
    assert padded.trained.last_loss != pytest.approx(padded.trained.first_loss, rel=1e-4)
    adapters = [
        load_file(one.run.adapter / "adapter_model.safetensors") for one in (padded, packed)
    ]
    moved = 0.0
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-4, atol=1e-6)
        moved = max(moved, float(tensor.abs().max()) if "lora_B" in name else 0.0)
    assert moved > 1e-4, "nothing was learned, so nothing was compared"


def test_micro_batches_of_packed_rows_weigh_every_token_alike(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """Rows hold different numbers of supervised tokens; one at a time is as all at once."""
    adapters = []
    for batch_size, accumulated in ((8, 1), (1, 8)):
        recipe = recipe_of(tmp_path / str(batch_size), tiny_llama, True, batch_size)
        train = recipe.train.model_copy(update={"gradient_accumulation_steps": accumulated})
        result = run_recipe(recipe.model_copy(update={"train": train}))
        adapters.append(load_file(result.run.adapter / "adapter_model.safetensors"))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-4, atol=1e-6)


def with_adapter(base: Base, rank: int) -> PeftModel:
    """Taken off again by `unload`."""
    base.model.__dict__.pop("peft_config", None)  # which that leaves
    model = get_peft_model(base.model, LoraConfig(r=rank, target_modules=["q_proj"]))
    assert isinstance(model, PeftModel)
    return model


class TestASecondStart:
    @pytest.fixture
    def num_probes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., list[int]]:
        """Of so many starts after each other, each with an adapter of its own."""
        monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
        probes: list[int] = []

        def probe(*arguments: Any) -> Leakage:
            probes.append(1)
            return measure_leakage(*arguments)

        monkeypatch.setattr("qlora_kit.train.batching.measure_leakage", probe)

        def counted(base: Base, *ranks: int, **values: Any) -> list[int]:
            counts = []
            for rank in ranks:
                model = with_adapter(base, rank)
                batching = plan(base, adapted=model, **values)
                counts.append(len(probes))
                assert batching.by_example
                model.unload()
            return counts

        return counted

    @pytest.mark.parametrize("packing", [False, True])
    def test_probes_nothing_again(
        self, base: Base, num_probes: Callable[..., list[int]], packing: bool
    ) -> None:
        assert num_probes(base, 2, 2, 3, packing=packing) == [1, 1, 2]

    def test_where_the_attention_is_another_is_probed(
        self, base: Base, num_probes: Callable[..., list[int]]
    ) -> None:
        assert num_probes(base, 2) == [1]
        base.model.set_attn_implementation("eager")
        try:
            model = with_adapter(base, 2)
            assert not plan(base, adapted=model, padding_free=True).by_example
            model.unload()
        finally:
            base.model.set_attn_implementation("sdpa")
