"""A run that was stopped and gone on with is the run that was not stopped, to the last bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_tiny

from qlora_kit.checkpoint.checkpoints import find_checkpoints, newest_whole
from qlora_kit.checkpoint.manifest import faults_of
from qlora_kit.checkpoint.run_directory import OPTIMIZER_FILE, RunDirectory
from qlora_kit.checkpoint.tensors import load_values
from qlora_kit.data import stream as data_stream
from qlora_kit.data.collate import Collator, IsolatingCollator
from qlora_kit.data.ledger import Ledger
from qlora_kit.data.pack import PackedSequences, pack
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.data.stream import Pass, StreamedSequences
from qlora_kit.environment import probe_hardware
from qlora_kit.errors import HardwareError, RunError
from qlora_kit.memory.kept import recomputing_layers
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.base import prepare_for_training
from qlora_kit.model.fused import linear
from qlora_kit.model.manifest import read_manifest
from qlora_kit.model.qat.aware import Aware
from qlora_kit.model.saved import adapter_files, save_adapter
from qlora_kit.processes import Processes
from qlora_kit.recipe import (
    LoraSpec,
    QuantizationAwareSpec,
    QuantizationSpec,
    TrainSpec,
)
from qlora_kit.report.reporter import Reporter
from qlora_kit.train.batching import Batching
from qlora_kit.train.best import best_checkpoint
from qlora_kit.train.continuation import Continuation, shape_for
from qlora_kit.train.held_out import HeldOutLoss
from qlora_kit.train.loader import lengths_of
from qlora_kit.train.memory import MemoryWatch
from qlora_kit.train.requests import TRIGGER_FILE, Requests
from qlora_kit.train.surroundings import Surroundings
from qlora_kit.train.train import TrainResult, train_adapter

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
        self.said: list[str] = []
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@dataclass(frozen=True)
class Outcome:
    result: TrainResult
    folder: Path
    weights: str
    warnings: list[str]
    said: list[str]

    @property
    def log(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


Run = Callable[..., Outcome]


def streamed(begun: list[int]) -> StreamedSequences:
    """The same rows, read in chunks of three; says from which row on each pass has rendered."""

    def one_pass(at: Pass) -> Iterator[TokenSequence]:
        rows = sequences()
        begun.append(at.num_rows)
        for start in range(at.num_rows, len(rows), 3):
            at.begin_chunk(start, start)
            yield from rows[start : start + 3]

    return StreamedSequences(one_pass, Ledger(), seed=1)


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Run:
    def build(
        name: str,
        *,
        stop_after: int | None = None,
        saves: tuple[int, ...] = (),
        again: bool = False,
        packed: bool = False,
        stream: StreamedSequences | None = None,
        lora: dict[str, Any] | None = None,
        bits: int = 4,
        aware: dict[str, Any] | None = None,
        seed_of_adapter: int = 1,
        processes: Processes | None = None,
        allow_drift: bool = False,
        **spec: Any,
    ) -> Outcome:
        quantization = QuantizationSpec(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        base = load_tiny(tiny_llama, quantization)
        prepare_for_training(base.model, upcast_norms=False)
        options = {"r": 4, "alpha": 8, "dropout": 0.1, **(lora or {})}
        seen = Aware(QuantizationAwareSpec(**aware), torch.float32) if aware else None
        adapted = attach_adapter(base, LoraSpec(**options), seed_of_adapter, seen)
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
            adapter_files=adapter_files(*described),
            keep_adapter=partial(save_adapter, *described),
            records={"note.txt": "kept"},
        )
        values = {
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "logging_steps": 3,
            "learning_rate": 1e-2,
            "num_train_epochs": 3.0,
            "optim": "paged_adamw_8bit",
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
        if stream is not None:
            given = stream.packed(40) if packed else stream
            batching = replace(batching, train=given, first=batching.train)
        continuation = None
        if again:
            found = newest_whole(folder)
            assert found.folder is not None
            continuation = Continuation.read(found.folder, allow_drift)
        result = train_adapter(
            adapted.model, base, batching, TrainSpec(**values), around, continuation
        )
        weights = digest_of_trainables(adapted.model)
        return Outcome(result, folder, weights, reporter.warnings, reporter.said)

    return build


def digest_of_trainables(model: torch.nn.Module) -> str:
    """SHA-256 over the bytes of every trainable parameter, in order."""
    digest = hashlib.sha256()
    for name, one in model.named_parameters():
        if one.requires_grad:
            digest.update(name.encode() + one.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


# The held-out losses of six evaluations, the best of them between two checkpoints.
GETS_WORSE = (3.0, 1.0, 0.5, 1.5, 2.0, 2.5)

CASES: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"optim": "adamw_8bit"},
    "paged_adamw_8bit": {},
    "paged_adamw_32bit": {"optim": "paged_adamw_32bit"},
    "adamw_torch": {"optim": "adamw_torch"},
    "adamw_torch_fused": {"optim": "adamw_torch_fused"},
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
    "aware of nf4": {"bits": 16, "aware": {"method": "nf4"}, "lora": {"dropout": 0.0}},
    "aware of int4 after a while": {
        "bits": 16,
        "aware": {"method": "int4-group", "group_size": 32, "start_after": 7},
        "lora": {"dropout": 0.0, "target_modules": ("q_proj", "down_proj")},
    },
    "all weights, aware of nf4": {"bits": 16, "aware": {"method": "nf4", "train": "full"}},
    "all weights, aware of int8 after a while": {
        "bits": 16,
        "aware": {"method": "int8", "train": "full", "start_after": 7},
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_gone_on_with_is_the_run_that_was_not_stopped(run: Run, case: str) -> None:
    values = CASES[case]
    whole = run("whole", **values)
    stopped = run("parts", stop_after=5, **values)
    assert (stopped.result.stop_signal, stopped.result.num_steps) == (SIGTERM, 5)
    assert stopped.weights != whole.weights
    # Another start of the adapter, which must not show.
    resumed = run("parts", again=True, seed_of_adapter=1 if case == "loftq" else 2, **values)
    assert resumed.weights == whole.weights
    assert resumed.log == whole.log
    seen = read_manifest(find_checkpoints(stopped.folder)[0]).quantization_aware
    assert (seen is not None) == ("aware" in values)
    for name in ("num_steps", "first_loss", "last_loss", "num_tokens", "num_padding_tokens"):
        assert getattr(resumed.result, name) == getattr(whole.result, name), name


def test_shortcuts_that_a_run_began_without_stay_left_out(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out on their trial does so in one start and not in the next."""

    def runs_out(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    values = {"gradient_checkpointing": False, "optim": "adamw_torch"}
    monkeypatch.setenv("QLORA_KIT_CACHE", str(run("other", **values).folder / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(linear._SharedInput, "forward", staticmethod(runs_out))
        whole = run("whole", **values)
        run("parts", stop_after=5, **values)
    resumed = run("parts", again=True, **values)
    assert any("LoRA as one operation" in one for one in resumed.warnings)
    assert resumed.weights == whole.weights


PLATEAU = {**CASES["plateau"], "save_strategy": "steps", "save_steps": 4, "keep_best": True}


class TestASignalDuringAnEvaluation:
    """Who sends it waits for less long than an evaluation may take, and then kills."""

    @pytest.fixture
    def signalled(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
        """Let the signal come with the n-th batch of held-out rows; returns the batches taken."""

        def at(number: int) -> list[int]:
            taken: list[int] = []
            own = HeldOutLoss._sum_of

            def sum_of(held_out: HeldOutLoss, *arguments: Any) -> Any:
                taken.append(len(taken) + 1)
                if len(taken) == number:
                    held_out.stop_signal = lambda: SIGTERM
                return own(held_out, *arguments)

            monkeypatch.setattr(HeldOutLoss, "_sum_of", sum_of)
            return taken

        return at

    @pytest.mark.parametrize("batch", [1, 2, 7])
    def test_is_answered_with_the_next_batch_and_made_up_for(
        self, run: Run, signalled: Callable[[int], list[int]], batch: int
    ) -> None:
        values = {**PLATEAU, "per_device_eval_batch_size": 2, "save_total_limit": None}
        whole = run("whole", **values)
        taken = signalled(batch)
        stopped = run("parts", **values)
        assert len(taken) == batch
        assert stopped.result.stop_signal == SIGTERM
        newest = find_checkpoints(stopped.folder)[0]
        assert json.loads((newest / "progress.json").read_text())["is_evaluation_due"]
        resumed = run("parts", again=True, **values)
        assert resumed.weights == whole.weights
        assert resumed.log == whole.log
        assert best_checkpoint(resumed.folder) is not None

    def test_again_while_it_is_made_up_for_leaves_the_checkpoint(
        self, run: Run, signalled: Callable[[int], list[int]]
    ) -> None:
        values = {**PLATEAU, "per_device_eval_batch_size": 2}
        whole = run("whole", **values)
        taken = signalled(2)
        first = run("parts", **values)
        taken.clear()
        again = run("parts", again=True, **values)
        assert (again.result.stop_signal, again.result.num_steps) == (SIGTERM, 2)
        assert again.weights == first.weights
        signalled(0)
        resumed = run("parts", again=True, **values)
        assert (resumed.weights, resumed.log) == (whole.weights, whole.log)

    def test_where_one_is_known_none_is_begun(
        self, run: Run, signalled: Callable[[int], list[int]]
    ) -> None:
        values = {**PLATEAU, "per_device_eval_batch_size": 2}
        taken = signalled(0)
        stopped = run("parts", stop_after=2, **values)
        assert (taken, stopped.result.num_steps) == ([], 2)


@pytest.mark.parametrize("packed", [False, True])
def test_a_stream_goes_on_where_it_stood(
    run: Run, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """Unpacked, that is within the first pass, where it ends, and within the second."""
    monkeypatch.setattr(data_stream, "BUFFER_SEQUENCES", 4)
    values = {"packed": packed, "max_steps": 15, "per_device_train_batch_size": 1}
    whole = run("whole", stream=streamed([]), **values)
    for stop_after in (5, 11, 14):
        begun: list[int] = []
        run(f"parts {stop_after}", stream=streamed([]), stop_after=stop_after, **values)
        resumed = run(f"parts {stop_after}", stream=streamed(begun), again=True, **values)
        assert (resumed.weights, resumed.log) == (whole.weights, whole.log), stop_after
        assert resumed.result.num_tokens == whole.result.num_tokens
        assert begun[0] > 0


def test_a_log_that_lost_lines_is_told_and_has_them_back(run: Run) -> None:
    whole = run("whole")
    stopped = run("parts", stop_after=5)
    (stopped.folder / "log.jsonl").write_text("")
    resumed = run("parts", again=True)
    assert (resumed.weights, resumed.log) == (whole.weights, whole.log)
    assert [one for one in resumed.warnings if "were gone from it, and are put back" in one]
    assert not [one for one in whole.warnings if "log.jsonl" in one]


def test_a_run_stopped_several_times_is_still_the_same(run: Run) -> None:
    whole = run("whole")
    run("parts", stop_after=1)
    run("parts", again=True, stop_after=3)
    run("parts", again=True, stop_after=4)
    assert run("parts", again=True).weights == whole.weights


def test_the_closing_line_is_of_the_whole_run(run: Run) -> None:
    whole = run("whole", logging_steps=1)
    losses = [line["loss"] for line in whole.log if "loss" in line]
    assert whole.log[-1]["train_loss"] == pytest.approx(sum(losses) / len(losses))
    run("parts", stop_after=9, logging_steps=1)
    assert run("parts", again=True, logging_steps=1).log[-1] == whole.log[-1]


def test_what_is_logged_after_the_checkpoint_is_logged_once(run: Run) -> None:
    """A process that is killed has logged updates that no checkpoint holds."""
    whole = run("whole", logging_steps=1)
    stopped = run("parts", stop_after=6, saves=(4,), logging_steps=1, save_total_limit=None)
    newest = find_checkpoints(stopped.folder)[0]
    assert newest.name == "checkpoint-6"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    resumed = run("parts", again=True, logging_steps=1)
    assert [line["step"] for line in resumed.log if "loss" in line] == list(range(1, 13))
    assert resumed.log == whole.log


def test_a_finished_training_is_put_back_without_an_update(run: Run) -> None:
    whole = run("run", save_strategy="epoch")
    again = run("run", again=True, save_strategy="epoch")
    assert again.weights == whole.weights
    assert again.result.num_steps == whole.result.num_steps == 12
    assert (whole.result.num_steps_here, again.result.num_steps_here) == (12, 0)
    assert again.log == whole.log


def test_checkpoints_are_whole_and_hold_what_they_should(run: Run) -> None:
    outcome = run("run", save_strategy="steps", save_steps=4, save_total_limit=2)
    assert [path.name for path in find_checkpoints(outcome.folder)] == [
        "checkpoint-12",
        "checkpoint-8",
    ]
    for folder in find_checkpoints(outcome.folder):
        assert faults_of(folder) == ()
        names = {path.name for path in folder.iterdir()}
        assert names >= {
            "adapter_model.safetensors",
            "adapter_config.json",
            "optimizer.safetensors",
            "random.safetensors",
            "progress.json",
            "note.txt",
            "manifest.json",
            "tokenizer.json",
        }


def test_the_best_checkpoint_is_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter(GETS_WORSE)
    monkeypatch.setattr(HeldOutLoss, "measure", lambda *_: next(told))
    outcome = run(
        "run",
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        keep_best=True,
    )
    losses = {line["step"]: line["eval_loss"] for line in outcome.log if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert best == 6
    kept = {path.name for path in find_checkpoints(outcome.folder)}
    assert kept == {f"checkpoint-{best}", "checkpoint-12"}


def test_the_best_of_those_that_were_saved_is_kept_by_the_attempt_after(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second evaluation falls between two checkpoints."""
    told = iter((*GETS_WORSE, *GETS_WORSE))
    monkeypatch.setattr(HeldOutLoss, "measure", lambda *_: next(told))
    spec: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": 1,
        "keep_best": True,
    }
    whole = run("whole", **spec)
    losses = {line["step"]: line["eval_loss"] for line in whole.log if "eval_loss" in line}
    assert len(losses) == 6
    best = min((4, 8, 12), key=lambda step: losses[step])
    assert best == 4
    run("parts", stop_after=9, **spec)
    parts = run("parts", again=True, **spec)
    for outcome in (whole, parts):
        kept = {path.name for path in find_checkpoints(outcome.folder)}
        assert kept == {f"checkpoint-{best}", "checkpoint-12"}


def test_a_file_asks_for_a_checkpoint(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / TRIGGER_FILE).touch()
    outcome = run("run")
    assert [path.name for path in find_checkpoints(outcome.folder)] == ["checkpoint-1"]
    assert not (outcome.folder / TRIGGER_FILE).exists()


def test_time_asks_for_a_checkpoint(run: Run) -> None:
    outcome = run("run", save_minutes=1e-9, save_total_limit=None, max_steps=3)
    assert len(find_checkpoints(outcome.folder)) == 3


def test_another_optimizer_s_state_is_refused(run: Run) -> None:
    run("parts", stop_after=5, optim="adamw_torch")
    with pytest.raises((RunError, KeyError, ValueError)) as refused:
        run("parts", again=True, optim="lion_8bit")
    assert isinstance(refused.value, RunError)
    assert "optimizer" in str(refused.value)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup"])
def test_another_learning_rate_holds_from_there_on(run: Run, scheduler: str) -> None:
    """Where drift is allowed; the schedule stands where it stood."""
    options: dict[str, Any] = {"logging_steps": 1, "lr_scheduler_type": scheduler}
    run("parts", stop_after=5, **options)
    resumed = run("parts", again=True, learning_rate=1e-3, weight_decay=0.5, **options)
    other = run("other", learning_rate=1e-3, weight_decay=0.5, **options)
    rates = [line["learning_rate"] for line in resumed.log if "learning_rate" in line]
    lower = [line["learning_rate"] for line in other.log if "learning_rate" in line]
    assert rates[:5] == pytest.approx([10 * rate for rate in lower[:5]])
    assert rates[5:] == pytest.approx(lower[5:])


# Reduced at every second update from the fourth on: no loss is ever better than the first.
PLATEAU: dict[str, Any] = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {
        "patience": 0,
        "factor": 0.5,
        "threshold": 1e9,
        "threshold_mode": "abs",
    },
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
}


def plateau(**arguments: Any) -> dict[str, Any]:
    return {**PLATEAU, "lr_scheduler_kwargs": {**PLATEAU["lr_scheduler_kwargs"], **arguments}}


def rates_of(outcome: Outcome) -> list[float]:
    return [line["learning_rate"] for line in outcome.log if "learning_rate" in line]


class TestASchedulePutBackUnderOtherSettings:
    """Where drift is allowed: what was reached holds, and the rest is as the recipe now says."""

    def test_one_by_the_eval_loss(self, run: Run) -> None:
        """Every setting of it by itself: test_rates.py."""
        run("parts", stop_after=5, **PLATEAU)
        resumed = run("parts", again=True, **{**plateau(factor=0.1), "learning_rate": 1e-3})
        expected = [1e-2] * 4 + [5e-3, 5e-4] + [5e-5] * 2 + [5e-6] * 2 + [5e-7] * 2
        assert rates_of(resumed) == pytest.approx(expected)

    def test_each_group_of_lora_plus_keeps_its_ratio(self, run: Run) -> None:
        run("parts", stop_after=5, loraplus_lr_ratio=16.0, **PLATEAU)
        last = {"save_strategy": "epoch", "loraplus_lr_ratio": 8.0, "learning_rate": 1e-3}
        resumed = run("parts", again=True, **{**PLATEAU, **last})
        applied = {group["lr"] for group in groups_in(find_checkpoints(resumed.folder)[0])}
        embedding = 1e-6  # PEFT's own rate, which no recipe changes
        assert sorted(applied) == pytest.approx([embedding / 32, 1e-3 / 32, 8e-3 / 32])

    def test_from_updates_to_the_eval_loss_it_begins_at_the_rate_of_the_recipe(
        self, run: Run
    ) -> None:
        run("parts", stop_after=5, logging_steps=1, lr_scheduler_type="cosine")
        resumed = run("parts", again=True, **PLATEAU)
        # The first evaluation, at update 6, is what the next are held against.
        expected = [1e-2] * 3 + [5e-3] * 2 + [2.5e-3] * 2
        assert rates_of(resumed)[5:] == pytest.approx(expected)

    def test_from_the_eval_loss_to_updates_it_stands_at_the_update_reached(self, run: Run) -> None:
        cosine = {"logging_steps": 1, "lr_scheduler_type": "cosine", "save_strategy": "epoch"}
        run("parts", stop_after=5, **PLATEAU)
        resumed = run("parts", again=True, **cosine)
        other = run("other", **cosine)
        assert rates_of(resumed)[5:] == pytest.approx(rates_of(other)[5:])
        ends = [groups_in(find_checkpoints(one.folder)[0]) for one in (resumed, other)]
        applied = [[group["lr"] for group in groups] for groups in ends]
        assert applied[0] == pytest.approx(applied[1])

    def test_another_optimizer_begins_anew_and_the_schedule_does_not(self, run: Run) -> None:
        options: dict[str, Any] = {"logging_steps": 1, "lr_scheduler_type": "cosine"}
        run("parts", stop_after=5, optim="adamw_torch", **options)
        resumed = run("parts", again=True, allow_drift=True, optim="lion_8bit", **options)
        other = run("other", optim="lion_8bit", **options)
        assert rates_of(resumed) == pytest.approx(rates_of(other))


def groups_in(checkpoint: Path) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = load_values(checkpoint / OPTIMIZER_FILE)["optimizer"][
        "param_groups"
    ]
    return groups


def test_weights_that_cannot_be_put_back_exactly_are_refused(run: Run) -> None:
    run("parts", stop_after=5)
    with pytest.raises(RunError, match="trainable weights"):
        run("parts", again=True, lora={"r": 4, "alpha": 8, "new_tokens": ("<|one|>",)})


class TestProcesses:
    def test_fewer_or_more_share_the_same_global_batch(self, run: Run) -> None:
        stopped = run("parts", stop_after=5)
        continuation = Continuation.read(find_checkpoints(stopped.folder)[0])
        assert continuation.shared.items_per_update == 6
        spec = TrainSpec(per_device_train_batch_size=3, gradient_accumulation_steps=2)
        shape = shape_for(spec, Processes(rank=1, local_rank=1, count=2), continuation)
        assert (shape.per_device, shape.accumulation) == (3, 1)
        one = TrainSpec(per_device_train_batch_size=1, gradient_accumulation_steps=6)
        assert shape_for(one, Processes(count=3), continuation).accumulation == 2
        with pytest.raises(RunError, match="6 sequences per update") as refused:
            shape_for(spec, Processes(count=4), continuation)
        assert "Launch 1 or 2" in str(refused.value)

    def test_another_micro_batch_gives_the_same_run_but_for_rounding(self, run: Run) -> None:
        whole = run("whole", per_device_train_batch_size=3, gradient_accumulation_steps=2)
        run("parts", stop_after=5, per_device_train_batch_size=3, gradient_accumulation_steps=2)
        other = run(
            "parts", again=True, per_device_train_batch_size=6, gradient_accumulation_steps=1
        )
        mine = [line["loss"] for line in other.log if "loss" in line]
        theirs = [line["loss"] for line in whole.log if "loss" in line]
        assert mine == pytest.approx(theirs, rel=0.05)  # dropout is drawn in another shape


class TestMemory:
    def outcome(
        self,
        run: Run,
        monkeypatch: pytest.MonkeyPatch,
        fits: int,
        name: str = "limited",
        **spec: Any,
    ) -> Outcome:
        """A run in which more than `fits` sequences at a time are too much for the memory."""
        from peft import PeftModelForCausalLM

        forward = PeftModelForCausalLM.forward

        def limited(model: PeftModelForCausalLM, *args: Any, **inputs: Any) -> Any:
            outputs = forward(model, *args, **inputs)
            if len(inputs["input_ids"]) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return outputs

        with monkeypatch.context() as patch:
            patch.setattr(PeftModelForCausalLM, "forward", limited)
            return run(name, **{"gradient_checkpointing": True, **spec})

    def test_recomputing_comes_before_smaller_batches(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And is known to the run that goes on."""
        from peft import PeftModelForCausalLM

        forward = PeftModelForCausalLM.forward

        def limited(model: PeftModelForCausalLM, *args: Any, **inputs: Any) -> Any:
            recomputes = all(one.gradient_checkpointing for one in recomputing_layers(model))
            if model.training and len(inputs["input_ids"]) > 1 and not recomputes:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return forward(model, *args, **inputs)

        whole = run("whole", gradient_checkpointing=False)
        with monkeypatch.context() as patch:
            patch.setattr(PeftModelForCausalLM, "forward", limited)
            stopped = run("parts", stop_after=4)
            again = run("parts", again=True)
        assert sum("all layers recompute" in one for one in stopped.warnings) == 1
        assert not any("at a time" in one for one in stopped.warnings)
        assert again.warnings == []
        assert any(one.startswith("memory    all layers recompute") for one in again.said)
        assert again.weights == whole.weights, "the same numbers, to the bit"

    def test_smaller_micro_batches_train_the_same(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = {"lora": {"dropout": 0.0}, "per_device_train_batch_size": 4, "logging_steps": 1}
        whole = run("whole", **spec)
        limited = self.outcome(run, monkeypatch, 1, **spec)
        assert sum("out of memory" in one for one in limited.warnings) == 2
        assert "1 sequence at a time instead of 4" in limited.warnings[-1]
        losses = [[line["loss"] for line in one.log if "loss" in line] for one in (whole, limited)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        assert limited.result.num_tokens == whole.result.num_tokens

    def test_what_fits_is_kept_for_the_attempt_after(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So that it trains on as the run would have that was not stopped, to the bit."""
        spec = {"per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2}
        spec |= {"per_device_eval_batch_size": 4, "logging_steps": 1}
        whole = self.outcome(run, monkeypatch, 2, "whole", **spec)
        assert sum("out of memory at" in one for one in whole.warnings) == 1
        assert sum("out of memory in evaluation" in one for one in whole.warnings) == 1
        self.outcome(run, monkeypatch, 2, "parts", stop_after=4, **spec)
        again = self.outcome(run, monkeypatch, 2, "parts", again=True, **spec)
        assert again.warnings == []
        assert [one for one in again.said if one.startswith("memory")] == [
            "memory    2 of 4 sequences and 2 of 4 held-out rows at a time from the start: memory "
            "ran out with more before the checkpoint"
        ]
        assert (again.weights, again.log) == (whole.weights, whole.log)

    def test_another_micro_batch_is_tried(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = {"lora": {"dropout": 0.0}, "gradient_accumulation_steps": 1}
        self.outcome(
            run, monkeypatch, 2, "parts", stop_after=4, per_device_train_batch_size=6, **spec
        )
        spec["gradient_accumulation_steps"] = 2
        again = run("parts", again=True, per_device_train_batch_size=3, **spec)
        assert [one for one in again.said if one.startswith("memory")] == again.warnings == []

    def test_one_sequence_too_many_is_the_end_with_advice(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(HardwareError) as ended:
            self.outcome(run, monkeypatch, 0, gradient_checkpointing=False, optim="adamw_torch")
        for word in ("one sequence", "gradient_checkpointing", "max_length", "MiB", "optim"):
            assert word in str(ended.value)

    def test_no_advice_that_the_recipe_would_refuse(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A 4-bit base cannot be trained on with quantization in view."""
        aware = {"method": "nf4", "train": "full"}
        with pytest.raises(HardwareError) as ended:
            self.outcome(run, monkeypatch, 0, bits=16, aware=aware)
        assert "train an adapter (quantization_aware.train: adapter)" in str(ended.value)
        assert "load_in_4bit" not in str(ended.value)


def test_a_flipped_byte_sends_the_run_back_to_the_checkpoint_before(run: Run) -> None:
    whole = run("whole")
    stopped = run("parts", stop_after=6, saves=(4,), save_total_limit=None)
    newest = find_checkpoints(stopped.folder)[0]
    path = newest / OPTIMIZER_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    found = newest_whole(stopped.folder)
    assert (found.step, found.damaged[0][0]) == (4, newest)
    assert run("parts", again=True).weights == whole.weights
