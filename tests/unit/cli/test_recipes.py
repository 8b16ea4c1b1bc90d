"""The recipes that ship: found, listed, shown and copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from qlora_kit.cli import app
from qlora_kit.cli.recipes import describe, retarget, shipped_files
from qlora_kit.errors import QloraKitError

TEXT = """\
# accelerate launch -m qlora_kit train recipes/nested/tiny.yaml
#
# For tests. Memory: about 3 GiB on a laptop; no GPU.
model: {name_or_path: owner/tiny}
# train with recipes/nested/tiny.yaml
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: str) -> str:
    """Standard output of `qlora-kit recipes …`, which must end well."""
    result = CliRunner().invoke(app, ["recipes", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list_names_model_and_memory_of_every_recipe() -> None:
    listed = json.loads(invoke("--json"))
    assert [one["name"] for one in listed] == list(shipped_files())
    assert listed[0]["name"] == "quickstart"
    assert all(one["model"] and "GB" in one["memory"].replace("GiB", "GB") for one in listed)
    lines = invoke().splitlines()
    for one, line in zip(listed, lines, strict=False):
        assert line.split() == [one["name"], one["model"], *one["memory"].split()]


def test_describe_reads_the_header_only_for_memory() -> None:
    shown = describe("tiny", TEXT)
    assert (shown.model, shown.memory) == ("owner/tiny", "about 3 GiB on a laptop; no GPU")
    assert describe("tiny", "model: {name_or_path: x}\n").memory == ""


def test_show_prints_the_file_as_it_is() -> None:
    text = shipped_files()["quickstart"].read_text(encoding="utf-8")
    assert invoke("show", "quickstart") == text
    assert invoke("show", "recipes/quickstart.yaml") == text


def test_copy_keeps_the_recipe_and_its_command_names_the_copy(here: Path) -> None:
    out = invoke("copy", "quickstart", "mine.yaml")
    copied = (here / "mine.yaml").read_text(encoding="utf-8")
    original = shipped_files()["quickstart"].read_text(encoding="utf-8")
    assert copied.splitlines()[0] == "# qlora-kit train mine.yaml"
    assert yaml.safe_load(copied) == yaml.safe_load(original)
    assert "recipes/quickstart.yaml" not in copied
    assert "qlora-kit check mine.yaml" in out


def test_copy_goes_into_a_folder_or_beside(here: Path) -> None:
    (here / "folder").mkdir()
    invoke("copy", "quickstart", "folder")
    invoke("copy", "quickstart")
    assert (here / "folder" / "quickstart.yaml").is_file()
    assert (here / "quickstart.yaml").is_file()


def test_copy_overwrites_nothing(here: Path) -> None:
    mine = here / "quickstart.yaml"
    mine.write_text("mine")
    with pytest.raises(QloraKitError, match="is there already and was not touched"):
        invoke("copy", "quickstart")
    assert mine.read_text() == "mine"


def test_copy_into_a_missing_folder_is_one_message(here: Path) -> None:
    with pytest.raises(QloraKitError, match="cannot be written: No such file"):
        invoke("copy", "quickstart", "missing/x.yaml")
    assert list(here.iterdir()) == []


def test_unknown_name_is_guessed() -> None:
    with pytest.raises(QloraKitError, match="did you mean quickstart"):
        invoke("show", "quikstart")
    with pytest.raises(QloraKitError, match="there is quickstart, "):
        invoke("show", "nothing-like-it")


@pytest.mark.parametrize(
    "arguments",
    [
        ["show"],
        ["copy"],
        ["frobnicate"],
        ["list", "x"],
        ["show", "x", "y"],
        ["show", "x", "--json"],
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["recipes", *arguments]).exit_code == 2


def test_retarget_touches_the_header_alone_and_quotes() -> None:
    lines = retarget(TEXT, "nested/tiny", Path("my own.yaml")).splitlines()
    assert lines[0] == "# accelerate launch -m qlora_kit train 'my own.yaml'"
    assert lines[1:] == TEXT.splitlines()[1:]


def test_an_installed_wheel_carries_the_recipes() -> None:
    root = Path(__file__).parents[3]
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert '"recipes" = "qlora_kit/recipes"' in text
