"""What a model's config.json says, told apart from how and where it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.errors import ModelError
from qlora_kit.model.configured import changed_settings, config_text

CONFIG = {"hidden_size": 8, "rope_parameters": {"rope_type": "default"}, "dtype": "float32"}


def text(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(config, indent=len(config)))
    return config_text(folder)


def test_the_layout_place_writer_and_dtype_say_nothing(tmp_path: Path) -> None:
    written = text(tmp_path, **CONFIG)
    other = {"transformers_version": "1", "_name_or_path": "x", **CONFIG, "dtype": "float16"}
    assert text(tmp_path, **dict(reversed(other.items()))) == written


def test_nor_does_it_within_the_parts_of_a_model(tmp_path: Path) -> None:
    written = text(tmp_path, text_config={"dtype": "float32", "hidden_size": 8}, scale=10000)
    other = {"text_config": {"hidden_size": 8.0, "dtype": "float16"}, "scale": 1e4}
    assert text(tmp_path, **other, use_cache=False, architectures=["A"]) == written


def test_what_is_set_to_nothing_is_not_what_is_not_set(tmp_path: Path) -> None:
    """Where nothing is said some families have a window."""
    assert text(tmp_path, **CONFIG, sliding_window=None) != text(tmp_path, **CONFIG)


def test_all_else_does(tmp_path: Path) -> None:
    written = text(tmp_path, **CONFIG)
    assert text(tmp_path, **{**CONFIG, "rope_parameters": {"rope_type": "yarn"}}) != written


@pytest.mark.parametrize("content", ["[]", "{", None])
def test_what_is_none_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        config_text(tmp_path)


def test_changes_are_told_under_dotted_names() -> None:
    saved = json.dumps({"rope": {"type": "default"}, "gone": 1, "same": [1]})
    now = json.dumps({"same": [1], "rope": {"type": "yarn", "factor": 2.0}})
    assert changed_settings(saved, now) == (
        'gone 1 → not set, rope.factor not set → 2.0, rope.type "default" → "yarn"'
    )


def test_of_many_changes_a_few_are_told() -> None:
    saved, now = (json.dumps({f"s{n:02}": value for n in range(20)}) for value in (1, 2))
    assert changed_settings(saved, now).endswith("s07 1 → 2 and 12 more")


def test_long_values_are_cut() -> None:
    told = changed_settings(json.dumps({"a": "x" * 500}), json.dumps({"a": "x" * 500 + "y"}))
    assert 0 < len(told) < 200


def test_of_a_list_the_entry_is_told() -> None:
    saved, now = (json.dumps({"layer_types": ["full"] * 30 + [last]}) for last in ("full", "near"))
    assert changed_settings(saved, now) == 'layer_types.30 "full" → "near"'


def test_of_no_text_nothing_is_told() -> None:
    assert changed_settings("no text", "{}") == ""
