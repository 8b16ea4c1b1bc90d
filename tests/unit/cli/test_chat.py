"""`qlora-kit chat` with a tiny random model, through a pipe as a user would, and its core."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer
from typer.testing import CliRunner, Result

from qlora_kit.chat import prompt_ids, stream_reply, turn_ends
from qlora_kit.cli import app
from qlora_kit.data.examples import Message
from qlora_kit.errors import DataError
from qlora_kit.subject import Subject, load_subject


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def talker(tiny_llama_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with weights so large that each prompt gets an answer of its own."""
    folder = tmp_path_factory.mktemp("talker")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_untied)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 15
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama_untied).save_pretrained(folder)
    return folder


@pytest.fixture
def subject(talker: Path) -> Subject:
    return load_subject(str(talker))


@pytest.fixture
def plain(talker: Path, tmp_path: Path) -> Path:
    """The tiny model, with a tokenizer that has no chat template."""
    folder = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(talker).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(talker)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def chat(folder: Path, said: str, *options: str) -> Result:
    return CliRunner().invoke(
        app, ["chat", str(folder), *options], input=said, catch_exceptions=False
    )


def greedy_ids(folder: Path, text: str, num_tokens: int) -> list[int]:
    """What plain transformers answers to a rendered prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**ids, max_new_tokens=num_tokens, do_sample=False)
    new: list[int] = output[0, ids["input_ids"].shape[1] :].tolist()
    return new


def greedy(folder: Path, text: str, num_tokens: int) -> str:
    ids = greedy_ids(folder, text, num_tokens)
    said = AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)
    return str(said).replace("\r\n", "\n")


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def with_stops(subject: Subject, stops: frozenset[int]) -> Subject:
    return replace(subject, base=replace(subject.base, stop_ids=stops))


OPENING = "<|im_start|>assistant\n"


def test_a_piped_line_is_answered_once_and_only_the_answer_is_on_stdout(talker: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "qlora_kit", "chat", str(talker), "--max-new-tokens", "8"],
        input=b"hello\n",
        capture_output=True,
        check=True,
    )
    assert ended.stdout.decode() == greedy(talker, turn("user", "hello") + OPENING, 8) + "\n"
    assert ended.stderr.decode() == "(cut at 8 tokens; --max-new-tokens allows more)\n"


def test_what_it_is_told_beforehand_is_not_among_piped_answers(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_kit.cli.chat.trained_system_message", lambda examples: "Be brief.")
    said = chat(talker, "hello\n", "--max-new-tokens", "8")
    before = turn("system", "Be brief.")
    assert said.stdout == greedy(talker, before + turn("user", "hello") + OPENING, 8) + "\n"
    assert "beforehand" not in said.stderr


def test_turns_see_those_before_until_a_reset(talker: Path) -> None:
    first = turn("system", "be kind") + turn("user", "one")
    one = greedy(talker, first + OPENING, 6)
    both = first + turn("assistant", one) + turn("user", "two")
    two = greedy(talker, both + OPENING, 6)
    anew = greedy(talker, turn("system", "be kind") + turn("user", "two") + OPENING, 6)
    assert two != anew  # else the test could not tell
    said = "one\n\n   \ntwo\n/reset\ntwo\n/exit\nnever\n"
    result = chat(talker, said, "--max-new-tokens", "6", "--system", "be kind")
    assert result.exit_code == 0
    assert result.stdout == f"{one}\n{two}\n{anew}\n"


def test_without_a_template_each_line_is_continued(plain: Path) -> None:
    result = chat(plain, "turn the lamp\nhello\n", "--max-new-tokens", "5")
    wanted = [greedy(plain, text, 5) for text in ("turn the lamp", "hello")]
    assert result.stdout == "".join(f"{text}\n" for text in wanted)
    assert "no chat template: each line is continued" in result.stderr


def test_a_system_message_needs_a_template(plain: Path) -> None:
    with pytest.raises(DataError, match="--system needs a conversation"):
        chat(plain, "hello\n", "--system", "be kind")


def test_a_line_that_fills_the_context_is_said_and_fails(talker: Path) -> None:
    result = chat(talker, "hello " * 300 + "\nhello\n", "--max-new-tokens", "4")
    assert result.exit_code == 1
    assert "the model's context holds 256: there is no room for an answer" in result.stderr
    assert "Give a shorter one." in result.stderr
    assert result.stdout == greedy(talker, turn("user", "hello") + OPENING, 4) + "\n"


def test_an_answer_ends_where_the_context_does(talker: Path) -> None:
    line = "x" * 235
    tokens = AutoTokenizer.from_pretrained(talker)(turn("user", line) + OPENING)["input_ids"]
    room = 256 - len(tokens)
    assert 0 < room < 20
    result = chat(talker, f"{line}\n", "--max-new-tokens", "1000")
    assert result.stdout == greedy(talker, turn("user", line) + OPENING, room) + "\n"
    assert "the model's context is full: the answer ends here" in result.stderr
    assert result.exit_code == 0


def test_a_conversation_that_fills_the_context_can_be_reset(talker: Path) -> None:
    line = "x" * 150 + "\n"
    result = chat(talker, f"{line}{line}/reset\n{line}", "--max-new-tokens", "4")
    answer = greedy(talker, turn("user", line.strip()) + OPENING, 4)
    assert result.stdout == f"{answer}\n{answer}\n"
    assert "the conversation has" in result.stderr
    assert "no room for an answer. /reset starts anew." in result.stderr
    assert result.exit_code == 1


def test_generation_stops_at_the_end_of_the_turn(subject: Subject, talker: Path) -> None:
    """Any token can be made an end; that one must end the answer and not be shown."""
    ids = prompt_ids(subject.base.tokenizer, [Message("user", "hello")])
    said = greedy_ids(talker, turn("user", "hello") + OPENING, 8)
    shown = [len(subject.base.tokenizer.decode([i], skip_special_tokens=True)) for i in said]
    end = next(i for i in range(2, 8) if shown[i] and said[i] not in said[:i])
    stopping = with_stops(subject, frozenset({said[end]}))
    pieces: list[str] = []
    reply = stream_reply(stopping, ids, pieces.append, max_new_tokens=8)
    assert reply.ending == "stopped"
    assert reply.text == subject.base.tokenizer.decode(said[:end], skip_special_tokens=True)
    assert "".join(pieces) == reply.text


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(subject: Subject) -> None:
    ids = prompt_ids(subject.base.tokenizer, [Message("user", "hello")])
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 1:
            raise KeyboardInterrupt

    reply = stream_reply(subject, ids, write, max_new_tokens=200)
    assert reply.ending == "interrupted"
    assert "".join(pieces) == reply.text
    whole = stream_reply(subject, ids, lambda text: None, max_new_tokens=200)
    assert whole.text.startswith(reply.text)
    assert len(reply.text) < len(whole.text)


def test_a_word_that_was_under_way_at_ctrl_c_is_shown(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken = subject.base.tokenizer("hello wor", add_special_tokens=False)["input_ids"]

    def generate(streamer: BaseStreamer, **_: object) -> None:
        streamer.put(torch.tensor([[1, 1, 1]]))  # the prompt
        for token in spoken:
            streamer.put(torch.tensor([token]))
        raise KeyboardInterrupt

    monkeypatch.setattr(subject.model, "generate", generate)
    pieces: list[str] = []
    reply = stream_reply(subject, (1, 1, 1), pieces.append, max_new_tokens=20)
    assert (reply.text, reply.ending) == ("hello wor", "interrupted")
    assert pieces == ["hello ", "wor"]


def test_temperature_draws_tokens(subject: Subject) -> None:
    ids = prompt_ids(subject.base.tokenizer, [Message("user", "hello")])

    def answer(seed: int, temperature: float) -> str:
        torch.manual_seed(seed)
        return stream_reply(subject, ids, lambda text: None, 12, temperature).text

    assert answer(0, 0.0) == answer(1, 0.0)
    assert answer(0, 2.0) == answer(0, 2.0)
    assert answer(0, 2.0) != answer(1, 2.0)


def test_the_template_s_end_of_turn_stops_even_if_the_model_forgot_it(subject: Subject) -> None:
    end = subject.base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_ends(with_stops(subject, frozenset({0}))) == {0, end}


@pytest.mark.parametrize("splits", [True, False])
def test_what_a_line_spells_of_special_tokens_is_as_in_training(talker: Path, splits: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talker)
    token = tokenizer.eos_token
    ids = prompt_ids(tokenizer, [Message("user", f"hello {token} you")], False, splits)
    assert ids.count(tokenizer.eos_token_id) == int(not splits)
    assert token in tokenizer.decode(ids)
