"""Training on a tiny model: what it computes, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_tiny
from transformers import Trainer

from qlora_kit.checkpoint.run_directory import RunDirectory
from qlora_kit.data.collate import Batch, Collator, IsolatingCollator
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.environment import probe_hardware
from qlora_kit.errors import TrainingError
from qlora_kit.memory.ways import reordered_bytes
from qlora_kit.model import blockwise_attention
from qlora_kit.model.adapter import Adapted, attach_adapter, require_float32_trainables
from qlora_kit.model.base import Base, prepare_for_training
from qlora_kit.model.blockwise_attention import FEWEST_TOKENS
from qlora_kit.model.fused.residents import Residents
from qlora_kit.model.quantized import is_four_bit
from qlora_kit.model.saved import adapter_files, load_adapter, save_adapter
from qlora_kit.recipe import LoraSpec, QuantizationSpec, TrainSpec
from qlora_kit.report.reporter import SILENT
from qlora_kit.train import train as training
from qlora_kit.train.batching import Batching
from qlora_kit.train.memory import MemoryWatch
from qlora_kit.train.requests import TRIGGER_FILE, Requests
from qlora_kit.train.surroundings import Surroundings
from qlora_kit.train.train import TrainResult, train_adapter
from qlora_kit.train.trainer import QloraTrainer
from qlora_kit.train.updates import num_update_steps

POISONED_TOKEN = 300


def sequences(count: int = 16, length: int = 12) -> list[TokenSequence]:
    """Rows of different lengths; the first half of each is context."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for number in range(count):
        size = length + number % 5
        ids = torch.randint(3, 290, (size,), generator=generator).tolist()
        labels = [IGNORE_INDEX] * (size // 2) + ids[size // 2 :]
        made.append(TokenSequence(tuple(ids), tuple(labels), f"rows.jsonl:{number + 1}"))
    return made


@dataclass(frozen=True)
class Setup:
    base: Base
    adapted: Adapted


Start = Callable[..., Setup]


@pytest.fixture
def start(tiny_llama: Path) -> Start:
    def build(seed: int = 1, folder: Path = tiny_llama, **lora: object) -> Setup:
        base = load_tiny(folder)
        prepare_for_training(base.model, upcast_norms=False)
        return Setup(base, attach_adapter(base, LoraSpec(r=4, alpha=8, **lora), seed))

    return build


def train(
    setup: Setup,
    folder: Path,
    rows: list[TokenSequence],
    precision: str = "fp32",
    eval_rows: list[TokenSequence] | None = None,
    batches: Batching | None = None,
    **spec: object,
) -> TrainResult:
    values: dict[str, object] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "optim": "paged_adamw_8bit",
        "save_strategy": "no",
        "warmup_steps": 0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    described = (setup.adapted.model, setup.base, QuantizationSpec(), "0" * 64)
    around = Surroundings(
        hardware=probe_hardware(),
        precision=precision,
        run=RunDirectory(folder),
        memory=MemoryWatch(),
        reporter=SILENT,
        requests=Requests(folder / TRIGGER_FILE),
        adapter_files=adapter_files(*described),
        keep_adapter=partial(save_adapter, *described),
        records={},
    )
    return train_adapter(
        setup.adapted.model,
        setup.base,
        batches or Batching(rows, eval_rows or [], Collator(0), "padded"),
        TrainSpec(**{**values, **spec}),
        around,
    )


def adapter_of(setup: Setup) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in setup.adapted.model.named_parameters()
        if parameter.requires_grad
    }


def log_lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_the_base_stays_as_it_was(start: Start, tmp_path: Path) -> None:
    setup = start()
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in setup.adapted.model.named_parameters()
        if not parameter.requires_grad
    }
    result = train(setup, tmp_path, sequences(), num_train_epochs=4)
    assert result.last_loss < result.first_loss - 0.1
    assert result.num_steps == 16
    for name, parameter in setup.adapted.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_same_seed_same_adapter_other_seed_other_adapter(start: Start, tmp_path: Path) -> None:
    adapters = []
    for number, seed in enumerate((1, 1, 2)):
        setup = start(seed=seed, dropout=0.1)
        train(setup, tmp_path / str(number), sequences(), seed=seed)
        adapters.append(adapter_of(setup))
    first, second, other = adapters
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_accumulated_micro_batches_equal_one_batch(start: Start, tmp_path: Path) -> None:
    """1 × 8 and 8 × 1 weigh every supervised token alike, whatever the rows' lengths."""
    adapters = []
    for micro, accumulated in ((8, 1), (1, 8)):
        setup = start()
        train(
            setup,
            tmp_path / str(micro),
            sequences(),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulated,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.5,
        )
        adapters.append(adapter_of(setup))
    for name in adapters[0]:
        torch.testing.assert_close(adapters[0][name], adapters[1][name], rtol=1e-4, atol=1e-6)


def test_what_memory_is_spent_on_changes_no_number(start: Start, tmp_path: Path) -> None:
    adapters, held = [], []
    for recompute in (True, False, "auto"):
        setup = start()
        made = train(
            setup, tmp_path / str(recompute), sequences(), gradient_checkpointing=recompute
        )
        adapters.append(adapter_of(setup))
        held.append(made.resident_bytes)
    for other in adapters[1:]:
        assert all(torch.equal(adapters[0][name], other[name]) for name in adapters[0])
    packed = [one for one in setup.base.model.parameters() if is_four_bit(one)]
    all_of_them = 4 * sum(one.quant_state.shape.numel() for one in packed)  # type: ignore[attr-defined]
    assert held == [0, all_of_them, all_of_them]


def test_the_layout_of_weights_that_stay_changes_no_number(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none is held when training has ended."""
    adapters, made, residents = [], [], []

    def noted(**how: Any) -> Residents:
        residents.append(Residents(**how))
        return residents[-1]

    monkeypatch.setattr(training, "Residents", noted)
    for recompute in (True, False):
        setup = start()
        how: dict[str, Any] = {"gradient_checkpointing": recompute, "use_onednn": True}
        made.append(train(setup, tmp_path / str(recompute), sequences(), **how))
        adapters.append(adapter_of(setup))
    assert all(torch.equal(one, adapters[1][name]) for name, one in adapters[0].items())
    assert [one.is_reordered for one in made] == [False, True]
    most = reordered_bytes(setup.adapted.model)
    assert (made[0].resident_bytes, most // 2 < made[1].resident_bytes <= most) == (0, True)
    assert [one.num_bytes for one in residents] == [0, 0]


def test_first_loss_is_transformers_own(start: Start, tmp_path: Path) -> None:
    setup = start()
    rows = sequences(4)
    total = count = 0.0
    for row in rows:
        labels = torch.tensor([row.labels])
        with torch.no_grad():
            loss = setup.adapted.model(input_ids=torch.tensor([row.input_ids]), labels=labels).loss
        total += float(loss) * row.num_supervised
        count += row.num_supervised
    result = train(setup, tmp_path, rows, max_steps=1)
    assert result.first_loss == pytest.approx(total / count, rel=1e-5)


def test_padding_is_not_counted_as_tokens(start: Start, tmp_path: Path) -> None:
    rows = sequences()
    result = train(start(), tmp_path, rows)
    assert result.num_tokens == sum(len(row.input_ids) for row in rows)


def test_long_examples_go_in_blocks_and_the_heap_stays(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a batch without padding, from the recipe to the kernel."""
    rows = [*sequences(2), *sequences(2, length=FEWEST_TOKENS)]
    own, kept = blockwise_attention.attend, training.freed_blocks_kept
    lengths: list[int] = []
    wanted: list[bool] = []

    def watched(query: torch.Tensor, *given: Any) -> torch.Tensor:
        lengths.append(query.shape[2])
        return own(query, *given)

    def noted(is_wanted: bool) -> Any:
        wanted.append(is_wanted)
        return kept(is_wanted)

    monkeypatch.setattr(training, "freed_blocks_kept", noted)
    monkeypatch.setattr(blockwise_attention, "attend", watched)
    collator = IsolatingCollator(0, flatten=True)
    batches = Batching(rows, [], collator, "without padding", by_example=True)
    how: dict[str, Any] = {"batches": batches, "use_onednn": False}
    off = train(start(), tmp_path / "off", rows, blockwise_attention=False, **how)
    assert not lengths
    on = train(start(), tmp_path / "on", rows, blockwise_attention=True, **how)
    losses = (on.last_loss, off.last_loss)
    assert {FEWEST_TOKENS, FEWEST_TOKENS + 1} <= set(lengths)
    assert min(lengths) >= FEWEST_TOKENS
    assert wanted == [True, True]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_operations_are_counted_as_transformers_counts_them(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every update, the parameters once."""
    own = QloraTrainer.floating_point_ops
    seen: list[tuple[int, int]] = []

    def beside(trainer: QloraTrainer, inputs: Batch) -> int:
        seen.append((own(trainer, inputs), Trainer.floating_point_ops(trainer, inputs)))
        return seen[-1][0]

    monkeypatch.setattr(QloraTrainer, "floating_point_ops", beside)
    result = train(start(), tmp_path, sequences())
    assert len(seen) == result.num_steps
    assert all(ours == theirs > 0 for ours, theirs in seen)


def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_adapter(
    start: Start, tmp_path: Path, tiny_llama_untied: Path
) -> None:
    setup = start(folder=tiny_llama_untied)
    with torch.no_grad():
        setup.base.model.get_input_embeddings().weight[POISONED_TOKEN] = math.nan
    rows = sequences(8)
    bad = (*rows[5].input_ids[:-1], POISONED_TOKEN)
    rows[5] = TokenSequence((POISONED_TOKEN, *bad[1:]), rows[5].labels, "rows.jsonl:6")
    folder = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"loss became nan at step 2.*rows\.jsonl:6") as error:
        train(setup, folder, rows, train_sampling_strategy="sequential")
    kept = RunDirectory(folder).last_good
    assert str(kept) in str(error.value)
    load_adapter(start(folder=tiny_llama_untied).base, QuantizationSpec(), kept)  # it is usable
    from safetensors.torch import load_file

    saved = load_file(kept / "adapter_model.safetensors")
    assert saved
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    start: Start, tmp_path: Path
) -> None:
    setup = start()
    before = adapter_of(setup)
    name, parameter = next(
        (n, p) for n, p in setup.adapted.model.named_parameters() if p.requires_grad
    )
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"gradient norm became .* at step 1"):
        train(setup, tmp_path, sequences(8))
    assert torch.equal(parameter, before[name])


def test_trainables_in_16_bits_are_our_bug(start: Start) -> None:
    setup = start()
    require_float32_trainables(setup.adapted.model)
    setup.adapted.model.to(torch.bfloat16)
    with pytest.raises(AssertionError, match="not float32"):
        require_float32_trainables(setup.adapted.model)


def test_loraplus_gives_b_its_own_rate(start: Start, tmp_path: Path) -> None:
    """With a ratio, B moves further and A as before; sgd makes the step proportional."""
    steps = []
    for number, ratio in enumerate((None, 16.0)):
        setup = start()
        before = adapter_of(setup)
        train(
            setup,
            tmp_path / str(number),
            sequences(4),
            max_steps=1,
            optim="adamw_torch",
            loraplus_lr_ratio=ratio,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
        )
        after = adapter_of(setup)
        moved = {name: (after[name] - before[name]).abs().max().item() for name in after}
        steps.append(max(value for name, value in moved.items() if "lora_B" in name))
    assert steps[1] == pytest.approx(16 * steps[0], rel=0.01)


def test_neftune_changes_training_and_leaves_no_hook(start: Start, tmp_path: Path) -> None:
    losses = []
    for number, alpha in enumerate((None, 50.0)):
        setup = start()
        result = train(setup, tmp_path / str(number), sequences(4), neftune_noise_alpha=alpha)
        losses.append(result.first_loss)
        assert not setup.base.model.get_input_embeddings()._forward_hooks
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "optim", ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adafactor"]
)
def test_optimizers_train_without_a_warning(
    start: Start, tmp_path: Path, optim: str, recwarn: pytest.WarningsRecorder
) -> None:
    train(start(), tmp_path, sequences(8), optim=optim, learning_rate=1e-3)
    assert not [str(one.message) for one in recwarn if "aged optimizers" in str(one.message)]


@pytest.mark.parametrize(
    ("schedule", "kwargs"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("polynomial", {}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
        ("cosine_with_min_lr", {"min_lr": 1e-4}),
        ("cosine_warmup_with_min_lr", {"min_lr": 1e-4}),
        ("warmup_stable_decay", {"num_decay_steps": 2}),
    ],
)
def test_every_schedule_runs(
    start: Start, tmp_path: Path, schedule: str, kwargs: dict[str, float]
) -> None:
    train(
        start(),
        tmp_path,
        sequences(16),
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=kwargs,
        warmup_steps=1,
    )
    rates = [line["learning_rate"] for line in log_lines(tmp_path) if "learning_rate" in line]
    assert len(rates) == 4
    assert max(rates) == pytest.approx(1e-2)


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_every_order_of_rows_trains_each_row_once(
    start: Start, tmp_path: Path, strategy: str
) -> None:
    rows = sequences(13)
    result = train(start(), tmp_path, rows, train_sampling_strategy=strategy)
    assert result.num_tokens == sum(len(row.input_ids) for row in rows)


def test_log_has_one_line_per_logged_step_and_the_eval_loss(start: Start, tmp_path: Path) -> None:
    rows = sequences()
    train(start(), tmp_path, rows, eval_rows=rows[:4], eval_strategy="steps", eval_steps=2)
    lines = log_lines(tmp_path)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    assert all(line["tokens"] > 0 and line["seconds"] >= 0 for line in lines)


@pytest.mark.parametrize(("rows", "micro", "accumulated", "epochs"), [(17, 4, 2, 1), (16, 4, 3, 2)])
def test_predicted_number_of_steps_is_the_real_one(
    start: Start, tmp_path: Path, rows: int, micro: int, accumulated: int, epochs: int
) -> None:
    spec = TrainSpec(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        num_train_epochs=epochs,
    )
    result = train(
        start(),
        tmp_path,
        sequences(rows),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        num_train_epochs=epochs,
    )
    assert result.num_steps == num_update_steps(rows, spec)
