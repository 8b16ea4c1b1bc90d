"""A disk that fills up in the middle of quantize, merge or export: told, and nothing is left."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qlora_kit.export import export, merge_run

from .conftest import Call, FinishedRun, write_rows


class Limit:
    """How large a file may grow, as the system lets it."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, self.before[1]))

    def lift(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[Limit]:
    """The system refuses to let a file grow beyond that, as a full disk does."""
    limit = Limit(num_bytes)
    limit.set()
    try:
        yield limit
    finally:
        limit.lift()


def delay(limit: Limit, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
    """Until a function of a module has ended."""
    work = getattr(module, name)

    def then_limit(*arguments: Any) -> Any:
        made = work(*arguments)
        limit.set()
        return made

    limit.lift()
    monkeypatch.setattr(module, name, then_limit)


@pytest.fixture(scope="module", autouse=True)
def _probed() -> None:
    """What compilers write on the way is no file of the lab."""
    from qlora_kit.environment import probe_hardware

    probe_hardware()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [{"text": f"{n} lamps glow."} for n in range(40)])


@pytest.mark.parametrize("limit", [8_000, 60_000], ids=["logits", "weights"])
def test_quantize(limit: int, tmp_path: Path, tiny_llama: Path, rows: Path, call: Call) -> None:
    out = tmp_path / "lab" / "out"
    arguments = ("--method", "nf4", "--data", str(rows), "--max-tokens", "24")
    with files_of_at_most(limit):
        said = call("quantize", str(tiny_llama), *arguments, "--out", str(out))
    require_told(said.code, said.err, out)


@pytest.mark.parametrize("begins", ["at once", "after the record"])
def test_merge(
    begins: str,
    tmp_path: Path,
    finished: FinishedRun,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "lab" / "out"
    with files_of_at_most(20_000) as limit:
        if begins != "at once":
            delay(limit, monkeypatch, merge_run, "record_reference")
        said = call("merge", str(finished.folder), "--out", str(out))
    require_told(said.code, said.err, out)


@pytest.mark.parametrize("target", ["adapter", "int8"])
@pytest.mark.parametrize("begins", ["at once", "after the record"])
def test_export(
    begins: str,
    target: str,
    tmp_path: Path,
    finished: FinishedRun,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "lab" / "out"
    before = sorted(finished.folder.rglob("*"))
    with files_of_at_most(20_000) as limit:
        if begins != "at once":
            delay(limit, monkeypatch, export, "begin_ledger")
        said = call("export", str(finished.folder), "--to", target, "--out", str(out))
    require_told(said.code, said.err, out)
    left = set(finished.folder.rglob("*")) - set(before)
    assert left <= {finished.folder / "exports", finished.folder / "exports" / "ledger.json"}


def require_told(code: int, said: str, out: Path) -> None:
    assert code == 1
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "the disk refuses: File too large" in line
    assert "Make room" in line
    assert not out.parent.exists() or list(out.parent.iterdir()) == [], "something was left"
