"""Probes in a process of their own."""

from __future__ import annotations

import os
from functools import partial
from importlib import import_module

import pytest

from qlora_kit.doctor.apart import run_apart


def test_results_faults_and_crashes_are_all_outcomes(capfd: pytest.CaptureFixture[str]) -> None:
    outcomes = run_apart(
        {
            "good": partial(pow, 2, 5),
            "raises": partial(import_module, "a_module_that_is_not_there"),
            "crashes": os.abort,
            "after": os.getpid,
            "prints": partial(print, "upstream says hello"),
        }
    )
    assert list(outcomes) == ["good", "raises", "crashes", "after", "prints"]
    assert (outcomes["good"].value, outcomes["good"].fault) == (32, "")
    fault = outcomes["raises"].fault
    assert fault == "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    assert outcomes["crashes"].fault == "it crashed the process that it ran in"
    assert outcomes["after"].value not in (None, os.getpid())
    assert outcomes["prints"].fault == ""
    assert capfd.readouterr() == ("", "")
