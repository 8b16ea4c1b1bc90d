"""transformers' table of its own files, kept between starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils import import_utils

from qlora_kit.import_structure import _digest_of, remembering

REQUIRES = """
from ...utils.import_utils import requires
@requires(backends=("torch", "vision"))
class OneProcessor(object):
    pass
__all__ = ["OneProcessor"]
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A package with models, as an installer leaves it behind."""
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "site" / "transformers" / "models"
    (folder / "one").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "one" / "modeling_one.py").write_text('__all__ = ["One", "OneModel"]\n')
    (folder / "one" / "processing_one.py").write_text(REQUIRES)
    installed = tmp_path / "site" / "transformers-5.dist-info"
    installed.mkdir()
    (installed / "RECORD").write_text("transformers/models/__init__.py,sha256=abc,0\n")
    return folder


@pytest.fixture
def created():
    """(transformers' own function, which notes what it is asked for; what it was asked for)"""
    asked = []

    def create(path):
        asked.append(str(path))
        import_utils.create_import_structure_from_path.cache_clear()
        return import_utils.create_import_structure_from_path.__wrapped__(path)

    return create, asked


def record_of(models: Path) -> Path:
    return models.parent.parent / "transformers-5.dist-info" / "RECORD"


def test_the_second_start_is_told_the_same(models, created):
    create, asked = created
    first = remembering(create)(models)
    assert asked == [str(models)]
    assert remembering(create)(models) == first
    assert remembering(create)(models / "__init__.py") == first  # as the package itself asks
    assert asked == [str(models)]
    assert first["one"][frozenset({"torch"})] == {"modeling_one": {"One", "OneModel"}}
    assert first["one"][frozenset({"torch", "vision"})]["processing_one"] == {"OneProcessor"}


def test_what_transformers_itself_brings_is_told_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path))
    folder = Path(import_utils.__file__).parent.parent / "models"
    if _digest_of(folder) is None:
        pytest.skip("transformers is installed from a folder that somebody works on")
    wanted = import_utils.create_import_structure_from_path(str(folder))
    remembering(lambda _: wanted)(folder)
    found = remembering(lambda _: pytest.fail("made anew"))(folder)
    assert found == wanted
    assert list(found) == list(wanted)
    assert list(found["llama"]) == list(wanted["llama"])


def test_a_folder_that_somebody_adds_is_seen(models, created):
    create, asked = created
    remembering(create)(models)
    (models / "two").mkdir()
    (models / "two" / "modeling_two.py").write_text('__all__ = ["Two"]\n')
    assert "two" in remembering(create)(models)
    assert len(asked) == 2


def test_another_installation_is_looked_through(models, created):
    create, asked = created
    remembering(create)(models)
    record_of(models).write_text("transformers/models/__init__.py,sha256=other,0\n")
    (models / "one" / "modeling_one.py").write_text('__all__ = ["Other"]\n')
    found = remembering(create)(models)
    assert len(asked) == 2
    assert found["one"][frozenset({"torch"})] == {"modeling_one": {"Other"}}


@pytest.mark.parametrize("text", [None, "__editable__.transformers.pth,sha256=abc,0\n"])
def test_of_one_that_somebody_works_on_nothing_is_kept(models, created, text):
    create, asked = created
    record_of(models).unlink() if text is None else record_of(models).write_text(text)
    for _ in range(2):
        remembering(create)(models)
    assert len(asked) == 2


def test_of_other_folders_nothing_is_kept(models, created):
    create, asked = created
    for _ in range(2):
        remembering(create)(models / "one")
    assert len(asked) == 2


@pytest.mark.parametrize(
    "inner",
    [{frozenset(): {"configuration_one": ("OneConfig",)}}, {"x"}, {frozenset(): ["x"]}, {None: {}}],
)
def test_a_table_of_another_shape_is_not_kept(models, inner):
    asked = []

    def create(path):
        asked.append(path)
        return {"one": inner}

    for _ in range(2):
        assert remembering(create)(models) == {"one": inner}
    assert len(asked) == 2
