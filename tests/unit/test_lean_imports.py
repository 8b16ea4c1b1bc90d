"""Imports without what no verb needs."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_kit import lean_imports
from qlora_kit.lean_imports import distributions_of_packages, import_leanly

# What the line from a recipe to a trained adapter brings, then what others find afterwards.
_TRAINING = """
import torch  # as whoever has asked for the hardware
import json, sys
from qlora_kit.lean_imports import import_leanly
import_leanly()
import qlora_kit.run
spared = ("sklearn", "scipy", "torchao", "datasets", "torch._inductor.compile_fx")
brought = [name for name in spared if name in sys.modules]
import gc, importlib.util
import transformers.utils
print(json.dumps({
    "brought": brought,
    "asked": [transformers.utils.is_sklearn_available(), transformers.utils.is_scipy_available()],
    "found": [importlib.util.find_spec(name) is not None for name in spared[:4]],
    "collects": gc.isenabled(),
    "frozen": gc.get_freeze_count(),
}))
"""


@pytest.fixture
def finder(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    import_leanly()
    return sys.meta_path[0]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A module `qlora_kit.NAME`, of the text that it is given, as long as the test lasts."""
    import qlora_kit

    monkeypatch.setattr(qlora_kit, "__path__", [*qlora_kit.__path__, str(tmp_path)])
    made = []

    def make(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        made.append(f"qlora_kit.{name}")
        return made[-1]

    yield make
    for name in made:
        sys.modules.pop(name, None)


def test_training_brings_neither_scikit_learn_nor_a_compiler_and_leaves_them_to_others():
    ended = subprocess.run(
        [sys.executable, "-c", _TRAINING], capture_output=True, text=True, check=True
    )
    told = json.loads(ended.stdout.splitlines()[-1])
    there = [
        importlib.metadata.packages_distributions().get(name) for name in lean_imports._NOT_NEEDED
    ]
    assert told["brought"] == []
    assert told["asked"] == [False, False]
    assert told["found"] == [one is not None for one in there]
    assert told["collects"]
    assert told["frozen"] > 100_000


@pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="counts folders without Python files as packages too"
)
def test_packages_are_of_the_distributions_that_python_says():
    told, wanted = distributions_of_packages(), importlib.metadata.packages_distributions()
    assert {name: set(those) for name, those in told.items()} == {
        name: set(those) for name, those in wanted.items()
    }
    assert "pillow" in told["PIL"]


def test_a_distribution_without_metadata_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "odd-1.dist-info").mkdir()
    (tmp_path / "odd-1.dist-info" / "RECORD").write_text(
        "odd/__init__.py,,\nodd/data.bin,,\none.py,,\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert set(distributions_of_packages()) == {"odd", "one"}


def test_nothing_is_collected_while_own_modules_are_imported(finder, package):
    __import__(package("inner_one", "import gc\nwas = gc.isenabled()\n"))
    outer = package("outer_one", "import gc\nimport qlora_kit.inner_two\nwas = gc.isenabled()\n")
    package("inner_two", "")
    __import__(outer)
    assert not sys.modules["qlora_kit.inner_one"].was
    assert not sys.modules[outer].was  # after an import within it
    assert gc.isenabled()


def test_what_is_imported_after_transformers_can_be_garbage(finder, package):
    import transformers  # noqa: F401

    frozen = gc.get_freeze_count()
    __import__(package("late_one", "def f(): pass\nf.itself = f\n"))
    assert gc.get_freeze_count() == frozen


def test_a_module_that_fails_leaves_the_collector_on(finder, package):
    with pytest.raises(ZeroDivisionError):
        __import__(package("failing_one", "1 / 0\n"))
    assert gc.isenabled()


def test_who_has_turned_the_collector_off_finds_it_off(finder, package):
    gc.disable()
    try:
        __import__(package("quiet_one", ""))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_module_that_is_not_there_is_not_found(finder):
    assert finder.find_spec("qlora_kit.nowhere", [str(Path(__file__).parent)]) is None
    with pytest.raises(ModuleNotFoundError, match=r"qlora_kit\.nowhere"):
        __import__("qlora_kit.nowhere")


def test_asking_twice_puts_one_finder_there(finder):
    import_leanly()
    assert [type(one) for one in sys.meta_path].count(type(finder)) == 1


def test_a_package_that_was_there_stays(monkeypatch):
    there = object()
    monkeypatch.setitem(sys.modules, "sklearn", there)
    with lean_imports._lean_transformers():
        assert sys.modules["sklearn"] is there
    assert sys.modules["sklearn"] is there


def test_what_is_compiled_on_import_is_compiled_when_it_is_called(monkeypatch):
    asked = []

    def compile_at_once(function, **settings):
        asked.append(settings)
        return lambda value: function(value) + 1

    monkeypatch.setattr(torch, "compile", compile_at_once)
    with lean_imports._lean_bitsandbytes():

        @torch.compile(dynamic=False)
        def double(value):
            return 2 * value

        triple = torch.compile(lambda value: 3 * value)
    assert torch.compile is compile_at_once
    assert asked == []
    assert [double(2), double(3), triple(1)] == [5, 7, 4]
    assert asked == [{"dynamic": False}, {}]
