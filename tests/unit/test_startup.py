"""The parts of a start add up to the whole."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from qlora_kit.startup import STARTUP_FILE, UNTIMED, Startup, process_seconds


def test_every_moment_belongs_to_one_part(tmp_path: Path) -> None:
    laps = Startup()
    laps.lap("before")
    started = time.monotonic()
    time.sleep(0.05)
    laps.lap("one")
    time.sleep(0.03)
    laps.lap("two")
    time.sleep(0.02)
    laps.lap("one")
    seconds = time.monotonic() - started
    laps.end(tmp_path)
    time.sleep(0.05)
    laps.lap("after the end")
    laps.end(tmp_path)
    before, one, two = laps.items
    assert (before.name, one.name, two.name) == ("before", "one", "two")
    assert one.seconds >= 0.07
    assert abs(one.seconds + two.seconds - seconds) < 0.02
    kept = json.loads((tmp_path / STARTUP_FILE).read_text())
    assert [item["name"] for item in kept["items"]] == ["before", "one", "two"]
    assert kept["seconds"] == sum(item["seconds"] for item in kept["items"]) == laps.seconds
    assert laps.rows()[-1][3] == "100%"


def test_the_end_is_told_once(tmp_path: Path) -> None:
    told: list[Startup] = []
    laps = Startup(told.append)
    laps.lap("all")
    laps.end(tmp_path)
    laps.end(tmp_path)
    assert told == [laps]


def test_begins_with_the_process() -> None:
    script = (
        "import time; time.sleep(0.3); from qlora_kit.startup import *; print(process_seconds())"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    outside = time.monotonic() - started
    assert 0.3 <= float(done.stdout) <= outside + 0.02
    assert process_seconds() > 0


def test_nobody_asked(tmp_path: Path) -> None:
    UNTIMED.lap("anything")
    UNTIMED.end(tmp_path)
    assert not list(tmp_path.iterdir())
