"""Ollama's template says what the trained one says, or there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import build_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_kit.data.examples import Conversation, Message
from qlora_kit.data.template import apply_template
from qlora_kit.errors import ModelError
from qlora_kit.model.demo import demo_model_folder
from qlora_kit.quantize.gguf.ollama.go_template import GoTemplateError, quoted, render
from qlora_kit.quantize.gguf.ollama.modelfile import write_modelfile
from qlora_kit.quantize.gguf.ollama.translate import render_ollama, to_ollama
from qlora_kit.templates import library

# Begin and end of those formats that do not have ChatML's.
MARKS = {
    "alpaca": ("<s>", "</s>"),
    "gemma": ("<bos>", "<end_of_turn>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
    "vicuna": ("<s>", "</s>"),
}
TALK = (
    ("system", "Be brief."),
    ("user", "One?"),
    ("assistant", "1."),
    ("user", 'Two, "please"\n{{ .System }}?'),
)


def tokenizer_for(folder: Path, template: str, name: str = "") -> PreTrainedTokenizerBase:
    build_tokenizer(folder, template)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    if name in MARKS:
        begin, end = MARKS[name]
        tokenizer.add_special_tokens({"bos_token": begin, "eos_token": end})
    return tokenizer


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in turns), "a test")  # type: ignore


@pytest.mark.parametrize("name", library())
def test_each_template_of_the_kit_is_rendered_alike(tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_for(tmp_path, library()[name].read_text(), name)
    adds_bos = name in MARKS
    translated = to_ollama(tokenizer, adds_bos)
    assert translated.num_compared > 15
    begin = str(tokenizer.bos_token) if adds_bos else ""
    for turns in (TALK, TALK[1:], TALK[1:2], TALK[:2]):
        asked = conversation(*turns)
        expected = apply_template(asked, tokenizer, prompt=True)
        assert begin + render_ollama(translated.template, asked) == expected
    assert any("tools are left out" in note for note in translated.notes) == (
        name == "chatml-tools"
    )


@pytest.mark.demo
def test_the_demo_models_default_system_message_is_kept(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    translated = to_ollama(tokenizer, adds_bos=False)
    for turns in (TALK, TALK[1:2]):
        asked = conversation(*turns)
        expected = apply_template(asked, tokenizer, prompt=True)
        assert render_ollama(translated.template, asked) == expected
    assert "named SmolLM" in render_ollama(translated.template, conversation(("user", "Hi")))


def test_what_takes_blanks_away_is_noted(tmp_path: Path) -> None:
    template = library()["chatml"].read_text()
    trimming = template.replace("message['content']", "(message['content'] | trim)")
    assert trimming != template
    translated = to_ollama(tokenizer_for(tmp_path, trimming), adds_bos=False)
    assert any("takes away blanks" in note for note in translated.notes)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|im_start|>{{ loop.index }} {{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content | replace('emoji', '') | truncate(20) }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ],
    ids=["numbered turns", "capitals", "shortened"],
)
def test_what_cannot_be_said_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(ModelError, match=r"cannot\s+be written for Ollama"):
        to_ollama(tokenizer_for(tmp_path, template), adds_bos=False)


def test_a_begin_token_that_training_did_not_have_is_refused(tmp_path: Path) -> None:
    """A file that asks for one, and a template that was trained without: one too many."""
    tokenizer = tokenizer_for(tmp_path, library()["vicuna"].read_text(), "vicuna")
    template = str(tokenizer.chat_template).replace("{{- bos_token if", "{{- '' if")
    assert template != tokenizer.chat_template
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=r"Ollama would make ….<s>"):
        to_ollama(tokenizer, adds_bos=True)


def test_without_a_template_there_is_no_modelfile(tmp_path: Path) -> None:
    build_tokenizer(tmp_path, None)
    with pytest.raises(ModelError, match="has no chat template"):
        to_ollama(AutoTokenizer.from_pretrained(tmp_path), adds_bos=False)


def test_the_modelfile(tmp_path: Path) -> None:
    tokenizer = tokenizer_for(tmp_path, library()["chatml-tools"].read_text())
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    translated = write_modelfile(
        tmp_path,
        "model-Q8_0.gguf",
        tokenizer,
        adds_bos=False,
        context_tokens=32768,
        adapter="adapter.gguf",
    )
    text = (tmp_path / "Modelfile").read_text()
    assert text.startswith('FROM ./model-Q8_0.gguf\nADAPTER ./adapter.gguf\nTEMPLATE """{{-')
    assert f'TEMPLATE """{translated.template}"""\n' in text
    lines = text.splitlines()
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert {line for line in lines if line.startswith("PARAMETER ") and "stop" not in line} == {
        "PARAMETER temperature 0.7",
        "PARAMETER top_p 0.9",
        "PARAMETER repeat_penalty 1.1",
        "PARAMETER num_ctx 8192",
    }
    assert lines[-1].startswith("# tools are left out")
    (tmp_path / "generation_config.json").unlink()
    write_modelfile(tmp_path, "m.gguf", tokenizer, adds_bos=False, context_tokens=512)
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert "PARAMETER temperature 0" in lines
    assert "PARAMETER num_ctx 512" in lines
    assert not any(line.startswith("ADAPTER") for line in lines)


def test_quotes_do_not_end_the_template(tmp_path: Path) -> None:
    """Texts stand in it as Go's strings, so that three quotes never stand side by side."""
    template = library()["chatml"].read_text().replace("'<|im_start|>'", '\'"""<|im_start|>\'')
    tokenizer = tokenizer_for(tmp_path, template)
    write_modelfile(tmp_path, "m.gguf", tokenizer, adds_bos=False, context_tokens=None)
    _, written, _ = (tmp_path / "Modelfile").read_text().split('"""')
    asked = conversation(*TALK)
    expected = apply_template(asked, tokenizer, prompt=True)
    assert expected.startswith('"""<|im_start|>')
    assert render_ollama(written, asked) == expected


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("a {{- .X }} b {{ .X -}} \n c", "ax b xc"),
        ('{{ if eq .X "x" }}yes{{ else }}no{{ end }}', "yes"),
        ("{{ if not .Empty }}none{{ else if .X }}some{{ end }}", "none"),
        (
            "{{ range $i, $m := .L }}{{ $i }}{{ $m }}"
            "{{ if eq (len (slice $.L $i)) 1 }}!{{ end }}{{ end }}",
            "0a1b!",
        ),
        ("{{ range .L }}[{{ . }}]{{ end }}", "[a][b]"),
        ('{{ $v := .X }}{{ range .L }}{{ $v }}{{ $v = "" }}{{ end }}', "x"),
        ("{{/* a comment */}}{{ " + quoted('"\n\\{{') + " }}", '"\n\\{{'),
        ('{{ if and .X (ne .X "y") }}both{{ end }}{{ or .Empty "other" }}', "bothother"),
    ],
)
def test_the_language_is_gos(template: str, written: str) -> None:
    """What Go's documentation says of text/template."""
    assert render(template, {"X": "x", "Empty": "", "L": ["a", "b"]}) == written


@pytest.mark.parametrize("template", ["{{ if .X }}", "{{ .X", "{{ printf .X }}", "{{ end }}"])
def test_what_is_not_known_of_the_language_is_told(template: str) -> None:
    with pytest.raises(GoTemplateError):
        render(template, {"X": "x"})
