"""`qlora-kit doctor`: once for real on this machine, and as it looks where things are broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import qlora_kit.doctor
from qlora_kit.cli import app
from qlora_kit.doctor import Diagnosis, Finding
from qlora_kit.environment import probe_hardware


def doctor(*options: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *options], catch_exceptions=False)


def seem(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> None:
    """Let the machine be one where these things were found."""
    diagnosis = Diagnosis("3.12.0", "a test", None, (), findings)
    monkeypatch.setattr(qlora_kit.doctor, "diagnose", lambda omp_num_threads: diagnosis)


def test_json_says_what_this_machine_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "not" / "made"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    result = doctor("--json")
    values = json.loads(result.stdout)
    assert set(values) == {"holds", "python", "platform", "hardware", "packages", "findings"}
    assert (result.exit_code, values["holds"]) == (0, True)
    assert values["hardware"]["device"] == probe_hardware().device
    by_name = {finding["name"]: finding for finding in values["findings"]}
    assert {"packages", "torch", "device", "dtypes", "threads", "memory", "speed"} <= set(by_name)
    assert {"tensorboard", "wandb", "mlflow", "flash-attn", "kernels"} <= set(by_name)
    assert all(
        set(finding) == {"name", "status", "found", "means", "figures"}
        for finding in values["findings"]
    )
    assert 0.05 < by_name["4-bit"]["figures"]["weight_error"] < 0.12
    assert by_name["4-bit"]["figures"]["backward_error"] < 0.02
    assert 0 < by_name["optimizer"]["figures"]["relative_error"] < 0.15
    assert by_name["memory"]["figures"]["billion_parameters"] > 0
    assert "OMP_NUM_THREADS is 1000" in by_name["threads"]["found"]
    assert "it was not asked" in by_name["hub"]["found"]
    assert str(tmp_path / "not" / "made") in by_name["disk"]["found"]
    assert not (tmp_path / "not").exists()
    torch = next(package for package in values["packages"] if package["name"] == "torch")
    assert torch["fits"]
    assert torch["needed"] == ">=2.11"


def test_what_is_only_missing_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Finding("wandb", "missing", "not installed", "report_to needs it")
    seem(monkeypatch, Finding("torch", "ok", "2.14.0"), missing)
    result = doctor()
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["ok", "torch", "2.14.0"],
        ["missing", "wandb", "not", "installed"],
        ["→", "report_to", "needs", "it"],
        [],
        ["Everything", "that", "is", "needed", "works."],
    ]


def test_what_is_broken_fails_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seem(monkeypatch, Finding("4-bit", "broken", "does not run"), Finding("hub", "ok", "answers"))
    result = doctor()
    assert result.exit_code == 1
    assert "BROKEN   4-bit  does not run" in result.stdout
    assert "Broken: 4-bit." in result.stdout
    as_json = doctor("--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["holds"] is False
