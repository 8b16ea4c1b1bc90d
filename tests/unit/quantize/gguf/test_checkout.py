"""A checkout of llama.cpp that the environment names, for every verb and recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.errors import ModelError
from qlora_kit.quantize.gguf.scripts import find_llama_cpp


def make_checkout(folder: Path) -> Path:
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "build/bin/llama-quantize"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name in ("conversion", "gguf-py"):
        (folder / name).mkdir()
    return folder.resolve()


def test_it_is_taken_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for_all, named = make_checkout(tmp_path / "for all"), make_checkout(tmp_path / "named")
    monkeypatch.setenv("QLORA_KIT_LLAMA_CPP", str(for_all))
    found = find_llama_cpp()
    assert (found.folder, found.quantizer) == (for_all, for_all / "build/bin/llama-quantize")
    assert find_llama_cpp(named).folder == named


def test_one_that_is_none_is_told_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_KIT_LLAMA_CPP", str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"QLORA_KIT_LLAMA_CPP names .*gone, and there is no such"):
        find_llama_cpp()
    monkeypatch.setenv("QLORA_KIT_LLAMA_CPP", str(tmp_path))
    with pytest.raises(ModelError, match=r"lacks llama\.cpp's convert_hf_to_gguf\.py"):
        find_llama_cpp()
