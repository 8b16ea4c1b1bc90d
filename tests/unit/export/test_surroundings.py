"""Config, generation config and code beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from qlora_kit.errors import ModelError
from qlora_kit.export.surroundings import copy_code, save_config, save_generation_config

from .tiny_runs import llama


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    return source, out


def test_the_config_says_what_is_written(folders: tuple[Path, Path]) -> None:
    _, out = folders
    config = llama(tie_word_embeddings=True)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    save_config(config, out, dtype=torch.float16, num_rows=130, ties=False)
    saved = AutoConfig.from_pretrained(out)
    assert (saved.dtype, saved.vocab_size) == (torch.float16, 130)
    assert saved.tie_word_embeddings is False
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert config.vocab_size == 128, "the base's own config is left alone"
    assert config.quantization_config


def test_a_generation_config_is_copied_as_it_is(folders: tuple[Path, Path]) -> None:
    """transformers would refuse to save this one: a temperature without sampling."""
    source, out = folders
    values = {"temperature": 0.6, "do_sample": False, "eos_token_id": [4, 5]}
    (source / "generation_config.json").write_text(json.dumps(values))
    save_generation_config(source, llama(), 4, out)
    assert json.loads((out / "generation_config.json").read_text()) == values


def test_one_is_made_only_where_the_end_would_be_missed(folders: tuple[Path, Path]) -> None:
    source, out = folders
    save_generation_config(source, llama(), 1, out)
    assert not (out / "generation_config.json").exists(), "the config says it already"
    save_generation_config(source, llama(), 9, out)
    assert GenerationConfig.from_pretrained(out).eos_token_id == [1, 9]


def test_a_generation_config_that_is_none_is_refused(folders: tuple[Path, Path]) -> None:
    source, out = folders
    (source / "generation_config.json").write_text("[1, 2]")
    with pytest.raises(ModelError, match="is not a JSON object"):
        save_generation_config(source, llama(), 1, out)
    (source / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        save_generation_config(source, llama(), 1, out)


def test_a_models_own_code_goes_along(folders: tuple[Path, Path]) -> None:
    source, out = folders
    (source / "modeling_own.py").write_text("x = 1\n")
    copy_code(source, out)
    assert (out / "modeling_own.py").read_text() == "x = 1\n"
