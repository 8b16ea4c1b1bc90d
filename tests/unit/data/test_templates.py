"""Labels against a reference: what transformers masks where a template says `{% generation %}`.

Each twin is written from the description of its format, with the tag around what the assistant
writes, and shares nothing with our templates nor with how we find the answers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from qlora_kit.data.examples import Conversation, Message, ToolCall
from qlora_kit.data.prepare import prove_end_of_turn
from qlora_kit.data.render import render
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.sequences import IGNORE_INDEX
from qlora_kit.data.template import turn_end
from qlora_kit.templates import library

from .formats import (
    CHATML_TOKENS,
    FORMATS,
    LLAMA3_TOKENS,
    build,
)

ORIGIN = "rows.jsonl:1"


@dataclass(frozen=True)
class Twin:
    """A format once more, with what its tokenizer has to have."""

    template: str
    tokens: tuple[str, ...]
    bos: str | None
    eos: str
    end: str


CHATML = """\
{%- for turn in messages -%}
{{ '<|im_start|>' ~ turn.role ~ '\n' }}
{%- if turn.role == 'assistant' -%}
{%- generation -%}{{ turn.content ~ '<|im_end|>' }}{%- endgeneration -%}
{%- else -%}{{ turn.content ~ '<|im_end|>' }}{%- endif -%}
{{ '\n' }}
{%- endfor -%}"""

LLAMA3 = """\
{{- bos_token -}}
{%- for turn in messages -%}
{{ '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>' ~ '\n\n' }}
{%- if turn.role == 'assistant' -%}
{%- generation -%}{{ CONTENT ~ '<|eot_id|>' }}{%- endgeneration -%}
{%- else -%}{{ CONTENT ~ '<|eot_id|>' }}{%- endif -%}
{%- endfor -%}"""

# A system message is said by the user, before the first question.
GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set first = messages[0].content ~ '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for turn in rest -%}
{%- if turn.role == 'assistant' -%}
{{ '<start_of_turn>model\n' }}
{%- generation -%}{{ CONTENT ~ '<end_of_turn>' }}{%- endgeneration -%}{{ '\n' }}
{%- else -%}
{{ '<start_of_turn>user\n' ~ (first if loop.first else '') ~ CONTENT ~ '<end_of_turn>\n' }}
{%- endif -%}
{%- endfor -%}"""

# The space behind [/INST] is the model's to write.
MISTRAL = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set first = messages[0].content ~ '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for turn in rest -%}
{%- if turn.role == 'assistant' -%}
{%- generation -%}{{ ' ' ~ turn.content ~ eos_token }}{%- endgeneration -%}
{%- else -%}
{{ '[INST] ' ~ (first if loop.first else '') ~ turn.content ~ ' [/INST]' }}
{%- endif -%}
{%- endfor -%}"""

ALPACA = """\
{{- bos_token -}}
{%- for turn in messages -%}
{%- if turn.role == 'assistant' -%}{{ '### Response:\n' }}
{%- generation -%}{{ turn.content ~ eos_token }}{%- endgeneration -%}{{ '\n\n' }}
{%- elif turn.role == 'user' -%}{{ '### Instruction:\n' ~ turn.content ~ '\n\n' }}
{%- else -%}{{ turn.content ~ '\n\n' }}{%- endif -%}
{%- endfor -%}"""

VICUNA = """\
{{- bos_token -}}
{%- for turn in messages -%}
{%- if turn.role == 'assistant' -%}{{ 'ASSISTANT:' }}
{%- generation -%}{{ ' ' ~ turn.content ~ eos_token }}{%- endgeneration -%}{{ '\n' }}
{%- elif turn.role == 'user' -%}{{ 'USER: ' ~ turn.content ~ '\n' }}
{%- else -%}{{ turn.content ~ '\n\n' }}{%- endif -%}
{%- endfor -%}"""

TOOLS = """\
{%- if tools or messages[0].role == 'system' -%}
{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' -%}{{ messages[0].content }}{%- endif -%}
{%- if tools -%}
{%- if messages[0].role == 'system' and messages[0].content -%}{{ '\n\n' }}{%- endif -%}
{{ 'You may call functions. Their signatures are between <tools></tools>:\n<tools>' }}
{%- for tool in tools -%}{{ '\n' ~ tool | tojson }}{%- endfor -%}
{{ '\n</tools>\nFor each call return a JSON object with name and arguments between ' }}
{{- '<tool_call></tool_call>.' }}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- for turn in messages -%}
{%- if turn.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' }}
{%- generation -%}
{{ turn.content }}
{%- for call in turn.tool_calls or [] -%}
{%- if turn.content or loop.index > 1 -%}{{ '\n' }}{%- endif -%}
{{ '<tool_call>\n{"name": ' ~ call.function.name | tojson ~ ', "arguments": ' }}
{{- call.function.arguments | tojson ~ '}\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>' }}
{%- endgeneration -%}
{{ '\n' }}
{%- elif turn.role == 'tool' -%}
{{ '<|im_start|>tool\n<tool_response>\n' ~ turn.content ~ '\n</tool_response><|im_end|>\n' }}
{%- elif turn.role == 'user' -%}{{ '<|im_start|>user\n' ~ turn.content ~ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}"""

SMOLLM2 = (
    "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\n' ~ 'You are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{%- endif -%}" + CHATML
)

GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
LLAMA2_TOKENS = ("<unk>", "<s>", "</s>")
IM_END, EOT = "<|im_end|>", "<end_of_turn>"


def trimmed(template: str) -> str:
    return template.replace("CONTENT", "turn.content | trim")


def untrimmed(template: str) -> str:
    return template.replace("CONTENT", "turn.content")


OURS = {
    "alpaca": Twin(ALPACA, LLAMA2_TOKENS, "<s>", "</s>", "</s>"),
    "chatml": Twin(CHATML, CHATML_TOKENS, None, IM_END, IM_END),
    "chatml-tools": Twin(TOOLS, CHATML_TOKENS, None, IM_END, IM_END),
    "gemma": Twin(untrimmed(GEMMA), GEMMA_TOKENS, "<bos>", "<eos>", EOT),
    "llama3": Twin(
        untrimmed(LLAMA3), LLAMA3_TOKENS, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
    ),
    "mistral": Twin(MISTRAL, LLAMA2_TOKENS, "<s>", "</s>", "</s>"),
    "vicuna": Twin(VICUNA, LLAMA2_TOKENS, "<s>", "</s>", "</s>"),
}

FIELDS = {
    "chatml": CHATML,
    "smollm2": SMOLLM2,
    "llama3": trimmed(LLAMA3),
    "gemma": trimmed(GEMMA),
    "mistral": MISTRAL,
}

LAMP = {
    "type": "function",
    "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}},
}


def talk(*contents: str, system: str | None = None) -> Conversation:
    messages = [Message("system", system)] if system is not None else []
    for number, content in enumerate(contents):
        messages.append(Message("assistant" if number % 2 else "user", content))
    return Conversation(tuple(messages), ORIGIN)


CONVERSATIONS = [
    talk("hello", "fine, thanks 12"),
    talk("hello", "fine", "you?", "thanks", "12\n\n", "no"),
    talk("hello é🙂", '{"action":"set",\n"value":12}', system="be brief"),
    talk("hello\n", "fine \n more  text", "x", "y", system="be brief\n"),
]

CALLING = Conversation(
    (
        Message("user", "turn the lamp to 30"),
        Message("assistant", "", (ToolCall("lamp", {"to": 30}), ToolCall("lamp", {}))),
        Message("tool", '{"ok": 1}', name="lamp"),
        Message("assistant", "now the other", (ToolCall("lamp", {"é": [1, None]}),)),
        Message("tool", "done", name="lamp"),
        Message("assistant", "fine"),
    ),
    ORIGIN,
    tools=(LAMP,),
)


# GPT-4's and Llama 3's: line breaks stay together whatever follows.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@lru_cache
def ours(name: str) -> PreTrainedTokenizerBase:
    twin = OURS[name]
    template = library()[name].read_text(encoding="utf-8")
    return split_as_its_model(name, build(twin.tokens, twin.bos, twin.eos, template))


@lru_cache
def of_the_field(name: str) -> PreTrainedTokenizerBase:
    form = FORMATS[name]
    return split_as_its_model(name, build(form.tokens, form.bos, form.eos, form.template))


def split_as_its_model(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if name == "llama3":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return tokenizer


def reference(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[int], list[int]]:
    """Ids and labels as transformers makes them."""
    encoded: Any = tokenizer.apply_chat_template(
        [message.as_dict() for message in conversation.messages],
        tools=[dict(one) for one in conversation.tools] or None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    ids = list(encoded["input_ids"])
    mask = encoded["assistant_masks"]
    assert any(mask), "the twin marks nothing"
    labels = [one if yes else IGNORE_INDEX for one, yes in zip(ids, mask, strict=True)]
    return ids, labels


def agrees(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    sequence = render(conversation, tokenizer, "assistant")
    ids, labels = reference(conversation, tokenizer, template)
    assert tokenizer.decode(list(sequence.input_ids)) == tokenizer.decode(ids)
    assert list(sequence.input_ids) == ids
    assert list(sequence.labels) == labels


def test_each_of_our_templates_has_a_twin() -> None:
    assert set(library()) == set(OURS)
    assert all("generation %" not in path.read_text() for path in library().values())


@pytest.mark.parametrize("name", OURS)
def test_the_end_of_a_turn_is_proved(name: str) -> None:
    tokenizer = ours(name)
    end = tokenizer.convert_tokens_to_ids(OURS[name].end)
    assert turn_end(tokenizer).text == OURS[name].end
    assert prove_end_of_turn(tokenizer, frozenset({end})) == end


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
@pytest.mark.parametrize("name", OURS)
def test_our_templates_agree_with_their_twins(name: str, number: int) -> None:
    agrees(CONVERSATIONS[number], ours(name), OURS[name].template)


def test_calls_agree_with_their_twin() -> None:
    agrees(CALLING, ours("chatml-tools"), TOOLS)


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
@pytest.mark.parametrize("name", FIELDS)
def test_formats_of_the_field_agree_with_their_twins(name: str, number: int) -> None:
    conversation = CONVERSATIONS[number]
    if conversation.messages[0].role == "system" and not FORMATS[name].takes_system:
        with pytest.raises(RowRefused):
            render(conversation, of_the_field(name), "assistant")
        return
    agrees(conversation, of_the_field(name), FIELDS[name])


# Letters and spaces at whose edges vocabularies merge: pairs of line breaks, of spaces.
CONTENT = st.text(alphabet="ab 1\n,é🙂", max_size=10)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    contents=st.lists(CONTENT, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0),
    system=st.none() | CONTENT.filter(str.strip),
)
@pytest.mark.parametrize("name", OURS)
def test_whatever_is_said_the_supervised_text_is_that_of_the_twin(
    name: str, contents: list[str], system: str | None
) -> None:
    """Answers begin with a letter: where white space merges with the end of the prompt, the twin
    has the model learn what generation gives it, and we do not.
    """
    tokenizer = ours(name)
    contents = [f"a{one}" if number % 2 else one for number, one in enumerate(contents)]
    conversation = talk(*contents, system=system)
    sequence = render(conversation, tokenizer, "assistant")
    ids, labels = reference(conversation, tokenizer, OURS[name].template)
    assert tokenizer.decode(list(sequence.input_ids)) == tokenizer.decode(ids)
    end = tokenizer.convert_tokens_to_ids(OURS[name].end)
    assert sequence.labels.count(end) == labels.count(end) == len(contents) // 2
    assert supervised(sequence.labels, tokenizer) == supervised(labels, tokenizer)


def supervised(labels: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


@pytest.mark.parametrize("name", ["alpaca", "mistral", "vicuna"])
def test_roles_that_a_format_does_not_know_are_refused(name: str) -> None:
    example = Conversation((*talk("a", "b").messages, Message("tool", "c")), ORIGIN)
    with pytest.raises(RowRefused, match="knows system, user and assistant"):
        render(example, ours(name), "assistant")


@pytest.mark.parametrize("name", OURS)
def test_a_system_message_is_there_once(name: str) -> None:
    text = ours(name).decode(list(render(CONVERSATIONS[2], ours(name), "assistant").input_ids))
    assert len(re.findall("be brief", text)) == 1


@pytest.mark.demo
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
@pytest.mark.parametrize("name", ["chatml", "smollm2", "chatml-tools"])
def test_on_a_real_tokenizer(name: str, number: int, demo_tokenizer: Any) -> None:
    own = {"chatml": CHATML, "chatml-tools": TOOLS, "smollm2": SMOLLM2}[name]
    if name != "smollm2":  # whose template is the tokenizer's own
        demo_tokenizer.chat_template = library()[name].read_text(encoding="utf-8")
    agrees(CONVERSATIONS[number], demo_tokenizer, own)
    if name == "chatml-tools":
        agrees(CALLING, demo_tokenizer, own)


@pytest.fixture
def demo_tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from qlora_kit.model.demo import demo_model_folder

    return AutoTokenizer.from_pretrained(demo_model_folder())
