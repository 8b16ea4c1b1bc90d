"""Training, transformers and llama.cpp read alike, and the first difference is shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_kit.errors import ModelError
from qlora_kit.quantize.gguf.parity import require_parity

if TYPE_CHECKING:
    from conftest import GgufFiles


@pytest.fixture(scope="module")
def trained(loud_llama: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(loud_llama)
    return tokenizer


@pytest.fixture
def other(loud_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tokenizer's folder in which something is changed."""

    def make(change: Callable[[dict[str, Any]], None], template: str | None = None) -> Path:
        folder = tmp_path / "other"
        shutil.copytree(loud_llama, folder)
        path = folder / "tokenizer.json"
        described = json.loads(path.read_text())
        change(described)
        path.write_text(json.dumps(described))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def forget_a_merge(described: dict[str, Any]) -> None:
    del described["model"]["merges"][0]


def test_all_three_read_alike(
    trained: PreTrainedTokenizerBase, loud_llama: Path, made_gguf: GgufFiles
) -> None:
    folder, made = made_gguf["F16"]
    parity = require_parity(trained, folder, folder / made.open)
    assert parity.num_conversations > 20
    assert parity.num_texts > 10
    assert parity.num_tokens > 1000
    assert require_parity(trained, loud_llama).num_tokens == parity.num_tokens


def test_llama_cpp_is_compared_on_composed_text_where_training_composes(
    loud_llama: Path, made_gguf: GgufFiles, tmp_path: Path
) -> None:
    """llama.cpp composes no characters, and every Qwen tokenizer does."""
    composing = AutoTokenizer.from_pretrained(loud_llama)
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    composing.save_pretrained(tmp_path)
    gguf_folder, made = made_gguf["F16"]
    assert require_parity(composing, tmp_path, gguf_folder / made.open).composed
    plain = AutoTokenizer.from_pretrained(loud_llama)
    assert not require_parity(plain, loud_llama, gguf_folder / made.open).composed


def test_another_template_in_the_folder(
    trained: PreTrainedTokenizerBase, other: Callable[..., Path]
) -> None:
    template = str(trained.chat_template).replace("<|im_end|>' + '\n'", "<|im_end|>'")
    assert template != trained.chat_template
    folder = other(lambda described: None, template)
    with pytest.raises(ModelError, match="the text differs at character") as caught:
        require_parity(trained, folder)
    assert "<|im_end|>\\n" in str(caught.value)


def test_another_template_in_the_file(
    trained: PreTrainedTokenizerBase, other: Callable[..., Path], made_gguf: GgufFiles
) -> None:
    template = str(trained.chat_template).replace("assistant", "model")
    changed = AutoTokenizer.from_pretrained(other(lambda described: None, template))
    folder = Path(changed.name_or_path)
    gguf_folder, made = made_gguf["F16"]
    with pytest.raises(ModelError, match="is not the one of training"):
        require_parity(changed, folder, gguf_folder / made.open)


def test_another_splitting_in_the_folder(
    trained: PreTrainedTokenizerBase, other: Callable[..., Path]
) -> None:
    with pytest.raises(ModelError, match=r"transformers on .* from token") as caught:
        require_parity(trained, other(forget_a_merge))
    assert "training has" in str(caught.value)


def test_another_splitting_in_the_file(other: Callable[..., Path], made_gguf: GgufFiles) -> None:
    folder = other(forget_a_merge)
    gguf_folder, made = made_gguf["F16"]
    with pytest.raises(ModelError, match=r"llama\.cpp on model-F16\.gguf reads"):
        require_parity(AutoTokenizer.from_pretrained(folder), folder, gguf_folder / made.open)


def test_an_end_that_llama_cpp_does_not_take_for_one(
    trained: PreTrainedTokenizerBase, loud_llama: Path, made_gguf: GgufFiles
) -> None:
    from qlora_kit.quantize.gguf.parity import _require_end
    from qlora_kit.runtime.llama_library import LoadedModel

    folder, made = made_gguf["F16"]
    changed = AutoTokenizer.from_pretrained(loud_llama)
    changed.chat_template = str(trained.chat_template).replace("<|im_end|>", "<|im_start|>")
    loaded = LoadedModel(folder / made.open, vocab_only=True)
    try:
        with pytest.raises(ModelError, match="does not take for an end"):
            _require_end(changed, loaded, folder / made.open)
    finally:
        loaded.close()
