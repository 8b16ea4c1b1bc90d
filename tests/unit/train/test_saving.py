"""What is written beside training: waited for, told of, and kept by what it is worth."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR

from qlora_kit.checkpoint.checkpoints import find_checkpoints, newest_whole
from qlora_kit.checkpoint.disk import DISK, Disk
from qlora_kit.checkpoint.run_directory import RunDirectory
from qlora_kit.errors import CheckpointError
from qlora_kit.model.manifest import Manifest
from qlora_kit.model.saved import AdapterFiles
from qlora_kit.processes import ALONE
from qlora_kit.recipe import TrainSpec
from qlora_kit.report.reporter import Reporter
from qlora_kit.train import saving
from qlora_kit.train.history import HISTORY_FILE
from qlora_kit.train.known_shortcuts import Choice
from qlora_kit.train.loader import BatchShape
from qlora_kit.train.saving import Saver
from qlora_kit.train.shortcuts import NONE
from qlora_kit.train.snapshot import Progress

PATIENCE_SECONDS = 60.0


class Heard(Reporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.has_warned = threading.Event()

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.has_warned.set()


class Training:
    """One layer in training, and the saver of its run; `tokenizer` bytes never change."""

    def __init__(self, folder: Path, disk: Disk = DISK, tokenizer: int = 10_000, **spec: Any):
        folder.mkdir(exist_ok=True)
        self.folder, self.heard = folder, Heard()
        unchanging = {"tokenizer.json": bytes(tokenizer)}
        digests = {name: hashlib.sha256(one).hexdigest() for name, one in unchanging.items()}
        manifest = Manifest("a", None, "b", {}, "c", None, "d", {}, "e", digests)
        around: Any = SimpleNamespace(
            run=RunDirectory(folder),
            reporter=self.heard,
            processes=ALONE,
            disk=disk,
            records={"note.txt": "kept" * 1000},
            adapter_files=AdapterFiles(unchanging, digests, {"w": "weight", "b": "bias"}, manifest),
        )
        self.model = torch.nn.Linear(300, 100)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.progress = Progress()
        self.spec = TrainSpec(**{"save_total_limit": None, **spec})
        self.saver = Saver(around, BatchShape(1, 1, 1, 0), 100, self.spec, Choice(NONE, None))
        self.saver.step = SimpleNamespace(seconds=1.0)  # type: ignore[assignment]
        self.trainer: Any = SimpleNamespace(
            progress=self.progress,
            own_model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=ConstantLR(self.optimizer),
            accelerator=SimpleNamespace(scaler=None),
            args=SimpleNamespace(deepspeed_plugin=None),
            held_out=None,
            divisor=1,
            recompute=None,
        )
        self.saver.trainer = self.trainer

    def update(self, number: int, eval_loss: float | None = None) -> None:
        self.model(torch.ones(1, 300)).sum().backward()
        self.optimizer.step()
        self.progress.update, self.progress.eval_loss = number, eval_loss

    def save(self, number: int, eval_loss: float | None = None) -> list[int]:
        """Made, saved and whole on the disk; the updates of which there are checkpoints then."""
        self.update(number, eval_loss)
        self.saver.save()
        self.saver.settle()
        return self.saved

    @property
    def saved(self) -> list[int]:
        return sorted(int(one.name.partition("-")[2]) for one in find_checkpoints(self.folder))


class Refusing(Disk):
    """Syncs nothing."""

    def sync(self, path: Path) -> None:
        raise OSError(errno.EIO, "input/output error")


class Interrupting(Disk):
    """Interrupts the main thread in the first flush, which ends when the user has had an answer."""

    def __init__(self) -> None:
        self.is_awaited = threading.Event()
        self.is_answered = threading.Event()
        self._is_first = True

    def sync(self, path: Path) -> None:
        if self._is_first:
            self._is_first = False
            assert self.is_awaited.wait(PATIENCE_SECONDS)
            for _ in range(4):
                os.kill(os.getpid(), signal.SIGINT)
                if self.is_answered.wait(0.3):
                    break
            time.sleep(0.2)  # who does not wait is gone by then
        super().sync(path)


class TestTheEnd:
    @pytest.fixture(autouse=True)
    def _ctrl_c(self) -> Any:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.mark.parametrize("is_waiting", [False, True])
    def test_waits_for_the_writer_whoever_interrupts(
        self, tmp_path: Path, is_waiting: bool
    ) -> None:
        """Ctrl-C while an update is made or a checkpoint waited for, and once more after it."""
        disk = Interrupting()
        training = Training(tmp_path / "run", disk)
        training.heard.has_warned = disk.is_answered

        def end() -> None:
            training.update(1)
            training.saver.save()
            disk.is_awaited.set()
            if is_waiting:
                training.saver.settle()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), training.saver.settled():
            end()
        assert training.saved == [1]
        assert disk.is_answered.is_set()

    def test_tells_what_was_not_written_beside_what_ends_it(self, tmp_path: Path) -> None:
        training = Training(tmp_path / "run", Refusing())

        def end() -> None:
            training.update(1)
            training.saver.save()
            raise ValueError("something else")

        with pytest.raises(ValueError, match="something else"), training.saver.settled():
            end()
        (told,) = training.heard.warnings
        assert "checkpoint-1 could not be written" in told
        assert "No whole checkpoint is there yet. Make room or mend the disk" in told

    def test_says_nothing_where_all_is_well(self, tmp_path: Path) -> None:
        training = Training(tmp_path / "run")
        with training.saver.settled():
            training.update(1)
            training.saver.save()
        assert (training.saved, training.heard.warnings) == ([1], [])


def test_a_write_that_fails_is_known_once_it_has(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", Refusing())
    assert not training.saver.has_failed()
    training.update(1)
    training.saver.save()
    until_told(training.saver.has_failed)
    with pytest.raises(CheckpointError, match="checkpoint-1 could not be written"):
        training.saver.settle()
    assert not training.saver.has_failed()


@pytest.mark.parametrize(
    ("update", "is_limited", "is_copied"), [(5, False, True), (100, False, False), (5, True, False)]
)
def test_nothing_is_copied_where_training_waits(
    update: int,
    is_limited: bool,
    is_copied: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As behind the last of 100 updates, or where memory is limited: the checkpoint is whole then,
    whatever becomes of the weights, of which the saver has no copy.
    """
    asked: list[bool] = []
    own = saving.snapshot

    def noted(*arguments: Any, is_copied: bool) -> Any:
        asked.append(is_copied)
        return own(*arguments, is_copied=is_copied)

    monkeypatch.setattr(saving, "snapshot", noted)
    training = Training(tmp_path / "run")
    training.saver.is_beside = not is_limited
    training.update(update)
    training.saver.save()
    assert asked == [is_copied]
    if not is_copied:
        assert training.saver._writing is None
    training.saver.settle()
    training.update(update + 1)
    whole = newest_whole(training.folder).folder
    assert whole is not None
    assert whole.name == f"checkpoint-{update}"


def until_told(is_so: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE_SECONDS / 0.01)):
        if is_so():
            return
        threading.Event().wait(0.01)
    raise AssertionError("never")


def bytes_of(folder: Path) -> int:
    """Whole blocks, as the disk counts them."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir())


@pytest.mark.parametrize("tokenizer", [10_000, 20_000_000])
def test_room_is_asked_for_what_this_checkpoint_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: int
) -> None:
    """The first one is written before the optimizer has any state."""
    asked: list[int] = []
    monkeypatch.setattr(saving, "require_room", lambda _, needed, __: asked.append(needed))
    training = Training(tmp_path / "run", tokenizer=tokenizer)
    training.optimizer.zero_grad()
    training.progress.update = 1
    training.saver.save()
    training.saver.settle()
    training.save(2)
    taken = [bytes_of(training.folder / f"checkpoint-{number}") for number in (1, 2)]
    assert taken[1] > taken[0] + 2 * 4 * 30_000, "Adam's two states"
    for needed, takes in zip(asked, taken, strict=True):
        assert takes <= needed <= takes + 64 * 1024


def test_a_disk_that_does_not_say_its_room_is_told_of(tmp_path: Path) -> None:
    class Gone(Disk):
        def free_bytes(self, folder: Path) -> int:
            raise OSError(errno.ESTALE, "stale file handle")

    training = Training(tmp_path / "run", Gone())
    training.update(1)
    with pytest.raises(CheckpointError, match=r"stale file handle.* No whole checkpoint is there"):
        training.saver.save()


def test_under_deepspeed_nothing_is_saved(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.update(1)
    training.trainer.args.deepspeed_plugin = object()
    assert not training.saver.can_save()
    training.saver.save_last()
    training.saver.settle()
    assert training.saved == []
    training.trainer.args.deepspeed_plugin = None
    training.saver.save_last()
    training.saver.settle()
    assert training.saved == [1]


class TestTheBest:
    def training(self, folder: Path, limit: int = 1) -> Training:
        strategy: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps"}
        return Training(
            folder, **strategy, eval_steps=2, save_steps=4, save_total_limit=limit, keep_best=True
        )

    def test_is_the_best_of_those_that_are_saved(self, tmp_path: Path) -> None:
        """The best evaluation falls between two checkpoints; who asks for one gets it."""
        training = self.training(tmp_path / "run")
        assert training.save(4, 0.5) == [4]
        training.update(6, 0.1)
        assert training.save(8, 0.6) == [4, 8]
        assert training.save(9) == [4, 9], "asked for, and not evaluated"
        assert training.save(12, 0.7) == [4, 12]
        assert training.save(16, 0.4) == [16]
        assert training.save(20, float("nan")) == [16, 20]

    def test_counts_as_one_of_those_to_keep(self, tmp_path: Path) -> None:
        training = self.training(tmp_path / "run", limit=2)
        for number, loss in ((4, 0.5), (8, 0.6), (12, 0.7)):
            training.save(number, loss)
        assert training.saved == [4, 12]

    def test_is_another_where_it_is_gone_or_damaged(self, tmp_path: Path) -> None:
        training = self.training(tmp_path / "run", limit=3)
        for number, loss in ((4, 0.5), (8, 0.4), (12, 0.9)):
            training.save(number, loss)
        shutil.rmtree(training.folder / "checkpoint-8")
        training.spec = training.saver.spec = training.spec.model_copy(
            update={"save_total_limit": 1}
        )
        assert training.save(16, 0.8) == [4, 16]
        (training.folder / "checkpoint-4" / "note.txt").write_text("touched")
        training.save(20, 0.9)
        assert training.save(24, 0.9) == [16, 24]

    def test_is_not_deleted_because_it_cannot_be_read_now(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        training = self.training(tmp_path / "run")
        training.save(4, 0.5)
        training.save(8, 0.6)

        def refuse(run_folder: Path) -> None:
            raise OSError(errno.EIO, "input/output error", str(run_folder))

        monkeypatch.setattr(saving, "best_checkpoint", refuse)
        said = r"best checkpoint could not be looked for .*checkpoint-12 is whole"
        with pytest.raises(CheckpointError, match=said):
            training.save(12, 0.7)
        assert training.saved == [4, 8, 12]

    def test_is_still_known_to_the_attempt_after(self, tmp_path: Path) -> None:
        before = self.training(tmp_path / "run")
        before.save(4, 0.5)
        assert before.save(8, 0.6) == [4, 8]
        assert newest_whole(before.folder).step == 8
        after = self.training(before.folder)
        assert after.save(12, 0.55) == [4, 12]
        assert after.save(16, 0.4) == [16]


def test_a_checkpoint_holds_the_log_up_to_its_update(tmp_path: Path) -> None:
    training = Training(tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text("one line\nanother, of an update that the checkpoint is not of\n")
    training.progress.log_bytes = len("one line\n")
    training.save(1)
    assert (tmp_path / "checkpoint-1" / HISTORY_FILE).read_text() == "one line\n"
