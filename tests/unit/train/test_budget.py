"""Training within a budget: what is chosen, that it changes no loss, and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_kit.errors import HardwareError, RecipeError
from qlora_kit.memory import ways
from qlora_kit.model.fused.residents import Residents
from qlora_kit.recipe import TrainSpec, recipe_from_dict
from qlora_kit.recipe.size import size_bytes
from qlora_kit.report.reporter import Reporter
from qlora_kit.run import run_recipe
from qlora_kit.train import budget
from qlora_kit.train.budget import Fit
from qlora_kit.train.fitting import divisor_of, sequences_before
from qlora_kit.train.recompute import Recompute
from qlora_kit.train.snapshot import Progress


class Heard(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("20GiB", 20 * 2**30), ("1.5 MiB", 3 * 2**19), ("900MB", 900 * 10**6)],
)
def test_sizes_have_a_unit(text: str, wanted: int) -> None:
    assert size_bytes(text) == wanted


@pytest.mark.parametrize("text", ["20", "GiB", "-1GiB", "0GiB", "20 gigs"])
def test_what_is_no_size_is_a_fault_of_the_recipe(text: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.memory_budget: must be auto or a size"):
        recipe_from_dict(
            {
                "model": {"name_or_path": "demo/smollm2-135m-instruct"},
                "data": {"train": [{"path": "a.jsonl"}]},
                "train": {"memory_budget": text},
            },
            "x",
        )


def test_halves_until_it_fits() -> None:
    assert [divisor_of(8, n) for n in (8, 5, 4, 1)] == [1, 2, 2, 8]
    assert divisor_of(5, 3) == 2


def test_what_a_checkpoint_says_holds_for_the_same_recipe() -> None:
    spec = TrainSpec(memory_budget="2GiB")
    fitted: dict[str, int | None] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "max_memory_mib": None,
        "memory_budget_bytes": 2 * 2**30,
        "sequences_at_a_time": 2,
    }
    assert sequences_before(Progress(fitted=fitted), spec) == 2
    assert sequences_before(Progress(fitted=fitted), TrainSpec(memory_budget="3GiB")) is None
    assert sequences_before(Progress(), spec) is None
    assert sequences_before(None, spec) is None


ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"turn lamp {n} to {n * 10} percent" * (1 + n % 3)},
            {"role": "assistant", "content": '{"lamp":' + "7" * (n % 4) + "}"},
        ]
    }
    for n in range(16)
]


def trained(
    folder: Path, model: Path, memory_budget: str, evaluated: bool = False
) -> tuple[list[float], list[str]]:
    """(the loss of each update, or the held-out losses, what was said)"""
    folder.mkdir()
    rows, held_out = folder / "rows.jsonl", folder / "held_out.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:8]))
    held_out.write_text("".join(json.dumps(row) + "\n" for row in ROWS[8:]))
    values = {
        "model": {"name_or_path": str(model)},
        "data": {"train": [{"path": str(rows)}], "max_length": 128}
        | ({"eval": [{"path": str(held_out)}]} if evaluated else {}),
        "lora": {"r": 4, "alpha": 8},
        "quantization": {"compute_dtype": "float32"},
        "train": {
            "optim": "adamw_torch",
            "learning_rate": 0.01,
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "precision": "fp32",
            "memory_budget": memory_budget,
        }
        | ({"eval_strategy": "steps", "eval_steps": 1} if evaluated else {}),
        "export": {"merge": False},
        "run_dir": str(folder / "run"),
    }
    heard = Heard()
    run_recipe(recipe_from_dict(values, "test"), heard)
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").open()]
    name = "eval_loss" if evaluated else "loss"
    return [line[name] for line in lines if name in line], heard.lines


def test_losses_are_the_same_whatever_is_chosen(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors of so small a model are nothing beside the process and a chunk of logits, which
    are left out here.
    """
    monkeypatch.setattr(budget, "_taken_bytes", lambda _: 0)
    monkeypatch.setattr(budget, "bytes_of_update", lambda *_: 0)
    monkeypatch.setattr(ways, "_LOGITS_AT_ONCE", 0)
    wanted, said = trained(tmp_path / "auto", tiny_llama, "auto")
    assert not any(line.startswith("budget") for line in said)
    chosen = []
    for memory_budget in ("8MiB", "1000KiB", "400KiB"):
        losses, said = trained(tmp_path / memory_budget, tiny_llama, memory_budget)
        assert losses == pytest.approx(wanted, rel=1e-5)
        (line,) = [one for one in said if one.startswith("budget")]
        chosen.append(line)
    assert "4 of 4 sequences" in chosen[0]
    assert "0 of 2 layers recomputing" in chosen[0]
    assert "unpacked weights that stay" in chosen[0]
    assert len({line.split("; ")[0].split(": ")[1] for line in chosen}) == 3, chosen


def test_a_budget_holds_for_held_out_rows_as_well(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_taken_bytes", lambda _: 0)
    monkeypatch.setattr(budget, "bytes_of_update", lambda *_: 0)
    monkeypatch.setattr(ways, "_LOGITS_AT_ONCE", 0)
    wanted, said = trained(tmp_path / "much", tiny_llama, "8MiB", evaluated=True)
    assert not any("held-out rows at a time" in line for line in said)
    losses, said = trained(tmp_path / "little", tiny_llama, "400KiB", evaluated=True)
    assert len(losses) == 3
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert any("of 8 held-out rows at a time" in line for line in said), said


def test_a_budget_of_more_than_there_is_is_warned_of(tmp_path: Path, tiny_llama: Path) -> None:
    _, said = trained(tmp_path / "much", tiny_llama, "5000GiB")
    (line,) = [one for one in said if "is more than" in one]
    assert "train.memory_budget (5000GiB) is more than the " in line


def test_a_budget_that_nothing_fits_says_the_smallest_that_would(
    tmp_path: Path, tiny_llama: Path
) -> None:
    with pytest.raises(HardwareError, match=r"nothing fits train\.memory_budget") as caught:
        trained(tmp_path / "small", tiny_llama, "10MiB")
    smallest = str(caught.value).split("smallest that would: ")[1].split(",")[0]
    smallest_bytes = size_bytes(smallest)
    assert smallest_bytes is not None
    assert smallest_bytes > 10 * 2**20
    enough = smallest_bytes // 2**20 + 64  # the process may have grown since
    trained(tmp_path / "again", tiny_llama, f"{enough}MiB")


def test_activations_that_wait_elsewhere_give_the_same_bits(tiny_llama: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = get_peft_model(base.requires_grad_(False), LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.arange(3, 40)[None]
    found = []
    for offloads in (False, True):
        model.zero_grad()
        with Fit(Recompute(model, 0, 2), offloads=offloads).offloading():
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([one.grad.clone() for one in model.parameters() if one.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class TestResidents:
    def test_they_stay_as_far_as_there_is_room(self) -> None:
        layers = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
        residents = Residents(room_bytes=4 * 16)
        made = [residents.weight(one, torch.float32, lambda: torch.zeros(4, 4)) for one in layers]
        assert residents.num_bytes == 64
        assert residents.weight(layers[0], torch.float32, pytest.fail) is made[0]
        assert residents.weight(layers[1], torch.float32, lambda: made[0]) is made[0]

    def test_they_go_before_a_micro_batch_is_halved(self) -> None:
        residents = Residents(room_bytes=64)
        recompute = Recompute(torch.nn.Linear(2, 2), 0, 0, residents=residents)
        assert not recompute.can_give_more()
        residents.weight(torch.nn.Linear(4, 4), torch.float32, lambda: torch.zeros(4, 4))
        assert recompute.can_give_more()
        recompute.all()
        assert residents.num_bytes == residents.room_bytes == 0
