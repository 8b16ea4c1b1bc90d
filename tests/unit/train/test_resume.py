"""A run that was stopped and gone on with is the run that was not stopped, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_kit.checkpoint.checkpoints import find_checkpoints, newest_whole
from qlora_kit.checkpoint.manifest import faults_of
from qlora_kit.checkpoint.run_directory import RunDirectory
from qlora_kit.data.collate import Collator, IsolatingCollator
from qlora_kit.data.pack import PackedSequences, pack
from qlora_kit.data.render import IGNORE_INDEX, TokenSequence
from qlora_kit.environment import probe_hardware
from qlora_kit.errors import HardwareError, RunError
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.base import load_base, prepare_for_training
from qlora_kit.model.saved import save_adapter, write_adapter
from qlora_kit.processes import Processes
from qlora_kit.recipe import LoraSpec, ModelSpec, QuantizationSpec, TrainSpec
from qlora_kit.report.reporter import Reporter
from qlora_kit.train.batching import Batching
from qlora_kit.train.continuation import Continuation, shape_for
from qlora_kit.train.loader import lengths_of
from qlora_kit.train.memory import MemoryWatch
from qlora_kit.train.requests import TRIGGER_FILE, Requests
from qlora_kit.train.snapshot import OPTIMIZER_FILE, digest_of, trainables_of
from qlora_kit.train.train import Surroundings, TrainResult, train_adapter

SIGTERM = 15
# Of a line of the log, what a clock or a gauge says.
MEASURED = ("seconds", "tokens_per_second", "host_bytes", "device_peak_bytes")


def sequences(count: int = 22, longest: int = 17) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for number in range(count):
        size = 8 + number % (longest - 8)
        ids = torch.randint(3, 290, (size,), generator=generator).tolist()
        labels = [IGNORE_INDEX] * (size // 2) + ids[size // 2 :]
        made.append(TokenSequence(tuple(ids), tuple(labels), f"rows.jsonl:{number + 1}"))
    return made


class StopAfter(Requests):
    """Asks for the end of training after some updates, as a signal would."""

    def __init__(self, folder: Path, updates: int | None, saves: tuple[int, ...] = ()):
        super().__init__(folder / TRIGGER_FILE)
        self.updates = updates
        self.saves = saves
        self.seen = 0

    def take_save(self) -> bool:
        self.seen += 1
        if self.seen == self.updates:
            self.stop_signal = SIGTERM
        return super().take_save() or self.seen in self.saves


class Heard(Reporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@dataclass(frozen=True)
class Outcome:
    result: TrainResult
    folder: Path
    weights: str
    warnings: list[str]

    @property
    def log(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        kept = [line for line in lines if "loss" in line or "eval_loss" in line]
        return [{k: v for k, v in line.items() if k not in MEASURED} for line in kept]


Run = Callable[..., Outcome]


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Run:
    def build(
        name: str,
        *,
        stop_after: int | None = None,
        saves: tuple[int, ...] = (),
        again: bool = False,
        packed: bool = False,
        lora: dict[str, Any] | None = None,
        bits: int = 4,
        seed_of_adapter: int = 1,
        processes: Processes | None = None,
        **spec: Any,
    ) -> Outcome:
        quantization = QuantizationSpec(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        base = load_base(
            ModelSpec(name_or_path=str(tiny_llama)),
            quantization,
            torch.float32,
            "test",
            probe_hardware(),
        )
        prepare_for_training(base.model)
        options = {"r": 4, "alpha": 8, "dropout": 0.1, **(lora or {})}
        adapted = attach_adapter(base, LoraSpec(**options), seed_of_adapter)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        described = (adapted.model, base, quantization, "0" * 64)
        requests = StopAfter(folder, stop_after, saves)
        reporter = Heard()
        around = Surroundings(
            hardware=probe_hardware(),
            precision="fp32",
            run=RunDirectory(folder),
            memory=MemoryWatch(),
            reporter=reporter,
            requests=requests,
            write_adapter=partial(write_adapter, *described),
            keep_adapter=partial(save_adapter, *described),
            records={"note.txt": "kept"},
        )
        values = {
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "logging_steps": 3,
            "learning_rate": 1e-2,
            "num_train_epochs": 3.0,
            "save_strategy": "no",
            "warmup_steps": 2,
            **spec,
        }
        rows, held_out = sequences(), sequences(5)
        batching = Batching(rows, held_out, Collator(0), "padded")
        if packed:
            bins = pack(lengths_of(rows), 40)
            together = PackedSequences(rows, bins, lengths_of(rows))
            batching = Batching(together, held_out, IsolatingCollator(0), "packed")
        continuation = None
        if again:
            found = newest_whole(folder)
            assert found.folder is not None
            continuation = Continuation.read(found.folder)
        result = train_adapter(
            adapted.model, base, batching, TrainSpec(**values), around, continuation
        )
        return Outcome(result, folder, digest_of(trainables_of(adapted.model)), reporter.warnings)

    return build


CASES: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"optim": "adamw_8bit"},
    "paged_adamw_8bit": {},
    "paged_adamw_32bit": {"optim": "paged_adamw_32bit"},
    "adamw_torch": {"optim": "adamw_torch"},
    "ademamix_8bit": {"optim": "ademamix_8bit"},
    "lion_8bit": {"optim": "lion_8bit"},
    "rmsprop_bnb_8bit": {"optim": "rmsprop_bnb_8bit"},
    "adagrad": {"optim": "adagrad"},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd"},
    "neftune": {"neftune_noise_alpha": 5.0},
    "lora+": {"loraplus_lr_ratio": 16.0},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "in order": {"train_sampling_strategy": "sequential"},
    "packed": {"packed": True, "per_device_train_batch_size": 1},
    "plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
    "restarts": {"lr_scheduler_type": "cosine_with_restarts"},
    "no checkpointing": {"gradient_checkpointing": False},
    "modules to save": {"lora": {"modules_to_save": ("lm_head",)}},
    "new tokens": {"lora": {"new_tokens": ("<|one|>", "<|two|>")}},
    "dora": {"lora": {"use_dora": True}},
    "loftq": {"lora": {"init": "loftq"}},
    "8 bits": {"bits": 8},
    "16 bits": {"bits": 16},
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_gone_on_with_is_the_run_that_was_not_stopped(run: Run, case: str) -> None:
    values = CASES[case]
    whole = run("whole", **values)
    stopped = run("parts", stop_after=5, **values)
    assert stopped.result.stop_signal == SIGTERM and stopped.result.num_steps == 5
    assert stopped.weights != whole.weights
    # Another start of the adapter, which must not show.
    resumed = run("parts", again=True, seed_of_adapter=1 if case == "loftq" else 2, **values)
    assert resumed.weights == whole.weights
    assert resumed.log == whole.log
    for name in ("num_steps", "first_loss", "last_loss", "num_tokens", "num_padding_tokens"):
        assert getattr(resumed.result, name) == getattr(whole.result, name), name
