"""What `prove-resume` leaves behind when it is ended from outside."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from qlora_kit import cli

RECIPE = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"


def test_a_signal_ends_it_and_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As Ctrl-C does; the run under way, in a process of its own, ends with it."""
    places: list[Path] = []

    def proving(recipe: object, folder: Path, *_: object) -> None:
        places.append(folder)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("the signal was passed over")

    monkeypatch.setattr("qlora_kit.prove.prove_resume", proving)
    monkeypatch.setattr("qlora_kit.preflight.preflight", lambda recipe: ())
    monkeypatch.setattr("sys.argv", ["qlora-kit", "prove-resume", str(RECIPE)])
    before = signal.signal(signal.SIGTERM, _unheard)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert signal.getsignal(signal.SIGTERM) is _unheard
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert not places[0].exists()


def _unheard(*_: object) -> None:
    """Instead of the end of the tests."""
