"""What every verb owes its user before any work: help, at once, without the heavy libraries."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

from qlora_kit.cli import app

VERBS = [command.name for command in app.registered_commands]
HEAVY = ("torch", "transformers", "bitsandbytes", "peft", "datasets", "numpy")
FIVE_LINES = """\
model: {name_or_path: demo/smollm2-135m-instruct}
data:
  train: [{path: demo/commands, split: train}]
"""

# Runs verbs one after the other in a fresh interpreter; says how each ended and what was imported.
RUN_VERBS = """
import contextlib, io, json, sys
from qlora_kit.cli import app

codes = {}
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            app(line)
            code = 0
        except SystemExit as end:
            code = end.code
    codes[" ".join(line)] = [code, shown.getvalue()]
print(json.dumps({"codes": codes, "modules": sorted(sys.modules)}))
"""


def run_verbs(*lines: list[str]) -> tuple[dict[str, tuple[int, str]], set[str]]:
    ended = subprocess.run(
        [sys.executable, "-c", RUN_VERBS, json.dumps(lines)],
        capture_output=True,
        text=True,
        check=True,
    )
    values = json.loads(ended.stdout)
    return values["codes"], set(values["modules"])


def test_every_verb_has_help_that_loads_nothing_heavy() -> None:
    assert {"check", "train", "chat", "doctor", "recipes"} <= set(VERBS)
    codes, modules = run_verbs(*([verb, "--help"] for verb in VERBS))
    assert {line: code for line, (code, _) in codes.items()} == {
        f"{verb} --help": 0 for verb in VERBS
    }
    assert all(text.startswith("Usage:") for _, text in codes.values())
    assert not modules & {*HEAVY, "rich", "yaml", "qlora_kit.recipe"}


def test_check_loads_no_torch(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(FIVE_LINES)
    codes, modules = run_verbs(["check", str(recipe)])
    assert codes[f"check {recipe}"][0] == 0
    assert "qlora_kit.recipe" in modules  # it was really read
    assert not modules & set(HEAVY)


def test_recipes_loads_no_torch() -> None:
    codes, modules = run_verbs(["recipes"], ["recipes", "show", "quickstart"])
    assert all(code == 0 for code, _ in codes.values())
    assert not modules & set(HEAVY)


def test_help_is_instant() -> None:
    """Half a second of CPU; the least of three, since a busy machine only ever adds."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "qlora_kit", "--help"], check=True, capture_output=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        seconds.append(used)
    assert min(seconds) < 0.5


def test_what_a_run_says_about_itself_needs_no_torch() -> None:
    """A run that is finished is told at once."""
    code = "import sys, qlora_kit.report.narrate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
