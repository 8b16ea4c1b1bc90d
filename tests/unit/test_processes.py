"""Who goes first, who tells, and what becomes of a fault that one process meets."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from qlora_kit import cli
from qlora_kit.checkpoint.entry import Entry, require_alike, require_visible
from qlora_kit.checkpoint.fingerprints import Fingerprints
from qlora_kit.checkpoint.run_directory import RunDirectory
from qlora_kit.environment import probe_hardware
from qlora_kit.errors import (
    DataError,
    DiskError,
    Fault,
    HardwareError,
    LaunchError,
    ModelError,
    ProcessLost,
    QloraKitError,
    RecipeError,
    RunError,
)
from qlora_kit.processes import (
    ALONE,
    Processes,
    common_hardware,
    join,
    require_gpus,
    same_everywhere,
)
from qlora_kit.recipe import recipe_from_dict

T = TypeVar("T")


@dataclass(frozen=True)
class Second(Processes):
    """Rank 1 of two; what the first one gives to each exchange is set beforehand."""

    rank: int = 1
    local_rank: int = 1
    count: int = 2
    count_here: int = 2
    first: list[Any] = field(default_factory=list)

    def gathered(self, value: T) -> list[T]:
        return [self.first.pop(0), pickle.loads(pickle.dumps(value))]


def failing(error: QloraKitError) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_alone_everything_is_done_at_once() -> None:
    alone = Processes()
    assert alone.gathered(3) == [3]
    assert alone.on_main(lambda: 4) == alone.together(lambda: 4) == alone.first_here(lambda: 4)
    with pytest.raises(DataError) as caught:
        alone.together(failing(DataError("x")))
    assert not caught.value.is_told_elsewhere


def test_a_fault_of_the_main_one_is_raised_by_all_and_told_by_it() -> None:
    second = Second(first=[(DataError("no rows"), None)])
    with pytest.raises(DataError, match="no rows") as caught:
        second.on_main(lambda: None)
    assert caught.value.is_told_elsewhere


def test_only_the_main_one_works() -> None:
    second = Second(first=[(None, 7)])
    assert second.on_main(failing(DataError("not here"))) == 7


def test_a_fault_of_another_is_raised_as_well() -> None:
    second = Second(first=[None])
    with pytest.raises(ModelError, match="unreadable") as caught:
        second.together(failing(ModelError("unreadable")))
    assert caught.value.is_told_elsewhere, "the main one raises it, too"


def test_a_disk_that_refuses_one_ends_all() -> None:
    """With one message, as any other fault."""
    full = OSError(errno.ENOSPC, "No space left on device", "log.jsonl")

    def refuse() -> None:
        raise full

    first = replace(Second(first=[]), rank=0)
    heard: list[Any] = []

    def gathered(value: Any) -> list[Any]:
        heard.append(pickle.loads(pickle.dumps(value)))
        return [value, value]

    object.__setattr__(first, "gathered", gathered)
    with pytest.raises(DiskError, match=r"refuses: No space left on device \(log.jsonl\)") as told:
        first.on_main(refuse)
    assert not told.value.is_told_elsewhere
    with pytest.raises(DiskError, match="No space left") as other:
        Second(first=heard).on_main(refuse)
    assert other.value.is_told_elsewhere
    with pytest.raises(DiskError, match="No space left") as other:
        Second(first=[None]).together(refuse)
    assert other.value.is_told_elsewhere, "the main one raises it, too"


def test_the_first_of_a_machine_goes_first() -> None:
    done: list[str] = []
    second = Second(first=[None, None])
    assert second.first_here(lambda: done.append("read")) is None
    assert done == ["read"]
    with pytest.raises(DataError):
        Second(first=[DataError("x")]).first_here(lambda: done.append("not reached"))
    assert done == ["read"]


def test_a_lost_connection_is_told_by_two_at_most() -> None:
    for rank, is_silent in ((0, False), (1, False), (2, True)):
        one = Processes(rank=rank, local_rank=rank, count=4, count_here=4)
        with pytest.raises(ProcessLost, match="another of the 4") as caught, one.noticing_loss():
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1")
        assert caught.value.is_told_elsewhere == is_silent
        with pytest.raises(RuntimeError, match="shapes"), one.noticing_loss():
            raise RuntimeError("shapes do not fit")


def test_every_fault_crosses_to_another_process() -> None:
    fault = RecipeError("a.yaml", [Fault("lora.r", "must be positive", "try 16")])
    assert str(pickle.loads(pickle.dumps(fault))) == str(fault)


def test_what_each_finds_by_itself_is_told_once_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for local_rank in ("0", "3"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(DataError) as caught, same_everywhere():
            raise DataError("x")
        assert caught.value.is_told_elsewhere == (local_rank == "3")


def test_who_does_not_tell_leaves_time_to_who_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends the others as soon as one has failed."""
    waited: list[float] = []
    monkeypatch.setattr("qlora_kit.cli.time.sleep", waited.append)
    monkeypatch.setattr("sys.argv", ["qlora-kit", "train", str(tmp_path / "missing.yaml")])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        assert ("error: " in capsys.readouterr().err) == (rank == "0")
    assert len(waited) == 1
    assert waited[0] > 1


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "WORLD_SIZE is 2, and LOCAL_RANK",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "MPI started 2 processes"),
        ({"PMI_SIZE": "2"}, "MPI started 2 processes"),
    ],
)
def test_half_a_launch_is_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or they would wait for each other, or join in a way that nobody asked for."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=said):
        join("cpu")


def test_mpi_of_one_process_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "1")
    assert join("cpu") == ALONE


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    require_gpus(2)
    with pytest.raises(HardwareError, match=r"4 processes were launched .* has 2 GPUs"):
        require_gpus(4)


def test_all_decide_by_what_all_can_do() -> None:
    one = replace(probe_hardware(), native_bf16=True, slow_bf16=False, host_memory_bytes=8)
    two = replace(one, native_bf16=False, host_memory_bytes=4, reason="too slow")
    common = common_hardware([one, two])
    assert not common.native_bf16
    assert not common.has_bf16
    slow = replace(one, native_bf16=False, slow_bf16=True)
    assert common_hardware([one, slow]) == slow
    assert common.reason == "too slow"
    assert common.host_memory_bytes == 4
    assert common_hardware([one, one]) == one


def test_other_data_on_another_machine_is_refused() -> None:
    first = Fingerprints("b", "t", "c", "d", "e", "p", "h")
    require_alike([first, replace(first, packages="q", hardware="i")])
    with pytest.raises(RunError, match=r"data_train: d → z \(process 0 → process 1\)"):
        require_alike([first, replace(first, data_train="z")])


def test_a_checkpoint_that_this_machine_does_not_see_is_refused(tmp_path: Path) -> None:
    values = {"model": {"name_or_path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}}
    recipe = recipe_from_dict(values, "test")
    entry = Entry(RunDirectory(tmp_path), recipe, False, tmp_path / "checkpoint-4")
    with pytest.raises(RunError, match="a disk that all machines share"):
        require_visible(entry)
    (tmp_path / "checkpoint-4").mkdir()
    require_visible(entry)
