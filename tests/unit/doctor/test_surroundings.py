"""Disks, the hub and optional packages."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from qlora_kit import extras
from qlora_kit.doctor import surroundings
from qlora_kit.doctor.apart import Outcome
from qlora_kit.doctor.probes import hub_answer

GIB = 1024**3
PATIENCE_SECONDS = 60.0  # beside other work even this machine takes its time


class _Hub(BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    """A stand-in for the model hub on this machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(_Hub, "status", 200)
    with HTTPServer(("127.0.0.1", 0), _Hub) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield _Hub
        server.shutdown()


def test_the_hub_answers_or_not(hub: type[_Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_answer(PATIENCE_SECONDS) == ""
    monkeypatch.setattr(hub, "status", 503)
    assert hub_answer(PATIENCE_SECONDS) == "it answers with status 503"


def test_a_hub_that_nobody_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), _Hub) as server:
        port = server.server_port
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert "refused" in hub_answer(PATIENCE_SECONDS)


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection is made, and nothing comes back."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), _Hub) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub_answer(0.1) in ("timed out", "no answer in 0.1 s")


def test_hub_findings() -> None:
    assert surroundings.hub_finding(True, None).status == "note"
    assert "was not asked" in surroundings.hub_finding(True, None).found
    assert surroundings.hub_finding(False, Outcome("", "")).status == "ok"
    for unreachable in (Outcome("no answer in 3 s", ""), Outcome(None, "no answer in 3 s")):
        finding = surroundings.hub_finding(False, unreachable)
        assert finding.status == "missing"
        assert "no answer in 3 s" in finding.found


def test_folders_on_one_disk_are_one_finding_and_none_is_made(tmp_path: Path) -> None:
    absent = tmp_path / "a" / "b"
    (finding,) = surroundings.disk_findings([tmp_path, absent])
    assert f"{tmp_path}, {absent}" in finding.found
    assert finding.figures["free_bytes"] > 0
    assert not absent.exists()


@pytest.mark.parametrize(("free", "status"), [(100 * GIB, "ok"), (GIB, "note")])
def test_little_room_is_noted(
    free: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda path: usage)
    (finding,) = surroundings.disk_findings([tmp_path])
    assert finding.status == status
    assert f"{free / GIB:.1f} GiB free" in finding.found


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings.os, "access", lambda path, mode: False)
    (finding,) = surroundings.disk_findings([tmp_path])
    assert finding.status == "note"
    assert "cannot be written to" in finding.means


def test_every_extra_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"llama_cpp", "lm_eval"}
    monkeypatch.setattr(extras, "find_spec", lambda name: object() if name in present else None)
    found = {finding.name: finding for finding in surroundings.optional_findings("cpu")}
    assert extras.EXTRAS.keys() <= found.keys()
    assert found["lm-eval"].status == "ok"
    assert found["gguf"].status == found["onnx"].status == "missing"
    assert found["gguf"].found == "needs sentencepiece, not installed here"
    assert "pip install 'qlora-kit[gguf]'" in found["gguf"].means


def test_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"wandb", "kernels"}
    monkeypatch.setattr(
        surroundings, "find_spec", lambda name: object() if name in present else None
    )
    found = {finding.name: finding for finding in surroundings.optional_findings("cpu")}
    assert found["wandb"].status == "ok"
    assert "pip install 'qlora-kit[mlflow]'" in found["mlflow"].means
    assert "from the hub" in found["kernels"].means
    assert "from the hub" in found["flash-attn"].means
    monkeypatch.setattr(surroundings, "find_spec", lambda name: None)
    without = {finding.name: finding for finding in surroundings.optional_findings("cuda")}
    assert without["flash-attn"].means.endswith("flash_attention_2 fails")
