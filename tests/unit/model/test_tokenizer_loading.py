"""Loading a tokenizer: a template of one's own, and what is refused in one clear message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, build_tokenizer
from transformers import AutoTokenizer

from qlora_kit.errors import ModelError
from qlora_kit.model.tokenizer import load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


class TestTheTemplate:
    def test_a_file_replaces_the_tokenizer_s_own(self, folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "mine.jinja"
        path.write_text(TEMPLATE + "é", encoding="utf-8")
        tokenizer = load_tokenizer(folder, str(path))
        assert tokenizer.chat_template == TEMPLATE + "é"
        messages = [{"role": "user", "content": "hello"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "hello<eos>é"
        assert load_tokenizer(folder).chat_template == CHATML

    def test_a_tilde_is_the_home_folder(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "mine.jinja").write_text(TEMPLATE)
        assert load_tokenizer(folder, "~/mine.jinja").chat_template == TEMPLATE

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (None, "cannot be read: No such file"),
            (b"", "is empty"),
            (b" \n", "is empty"),
            (b"\xff\xfe\x00", "is not UTF-8 text"),
            (b"{% for m in messages %}\n{% endif %}", r"mine\.jinja:2 is not Jinja"),
            (b"hello\n\n{{ x | nonsense }}", r"mine\.jinja:3 is not Jinja: .*nonsense"),
        ],
    )
    def test_a_file_that_is_none(
        self, folder: Path, tmp_path: Path, content: bytes | None, said: str
    ) -> None:
        path = tmp_path / "mine.jinja"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelError, match=rf"model\.chat_template: .*{said}"):
            load_tokenizer(folder, str(path))

    def test_a_folder_in_its_place(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"model\.chat_template: .*cannot be read"):
            load_tokenizer(folder, str(tmp_path))


class TestWhatIsRefused:
    def test_a_folder_without_one(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no tokenizer that can be read.*tokenizer_name_or"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "Nonsense"}}'])
    def test_a_damaged_one(self, folder: Path, content: str) -> None:
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(ModelError, match="no tokenizer that can be read") as error:
            load_tokenizer(folder)
        assert str(folder) in str(error.value)

    @pytest.mark.parametrize(
        "damage", [{"pre_tokenizer": {"type": "Nope"}}, {"version": "9.0"}, {"added_tokens": 3}]
    )
    def test_one_that_the_library_cannot_parse(self, folder: Path, damage: dict[str, Any]) -> None:
        """It raises Exception itself."""
        path = folder / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **damage}))
        with pytest.raises(ModelError, match="no tokenizer that can be read"):
            load_tokenizer(folder)

    def test_one_without_a_fast_version(self, tmp_path: Path) -> None:
        config = {"tokenizer_class": "ByT5Tokenizer"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=r"no fast version \(tokenizer\.json\)"):
            load_tokenizer(tmp_path)

    def test_one_that_knows_no_tokens(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        state["model"] |= {"vocab": {}, "merges": []}
        path.write_text(json.dumps({**state, "added_tokens": []}))
        for other in folder.iterdir():
            if other != path:
                other.unlink()
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match="knows no tokens"):
            load_tokenizer(folder)

    def test_code_of_its_own_unless_trusted(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import dynamic_module_utils

        monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        own = Path(shutil.copytree(folder, tmp_path / "own"))
        config = json.loads((own / "tokenizer_config.json").read_text())
        config |= {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
        }
        (own / "tokenizer_config.json").write_text(json.dumps(config))
        (own / "own.py").write_text(
            "from transformers import PreTrainedTokenizerFast\n"
            "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
        )
        with pytest.raises(ModelError, match=r"own Python code.*model\.trust_remote_code: true"):
            load_tokenizer(own)
        trusted = load_tokenizer(own, trust_remote_code=True)
        assert type(trusted).__name__ == "OwnTokenizer"
        assert trusted.encode("hello") == AutoTokenizer.from_pretrained(folder).encode("hello")
