"""Conversations and texts in which tokenizers and templates are known to differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.data.examples import Conversation, Message, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS = {
    "plain": "How are you today? I'm fine, and you'll see: it's all right.",
    "numbers": "1 12 123 1234 12345 3.14159 1,000,000 2024-11-28 0x1F 1e-9 №7 ½ ²",
    "runs of spaces": "a  b   c    d     e\t\tf \t g  \n\n\n  h\r\n i   ",
    "code": "def f(x):\n    if x == 10:\n\t\treturn {'a': [1, 2]}  # done\n\n\nprint(f(3) ** 2)\n",
    "json": '{"action":"play","room":"living room","level":0.25,"tags":["a","b"],"x":null}',
    "accents": "Ça, c'est naïve façade — «Größe» Ærøskøbing, Ελληνικά, Привет, ё й",
    "other scripts": "日本語のテキスト 한국어 中文，标点。 العربية עברית हिन्दी ภาษาไทย",
    "emoji": "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 1️⃣ ☃️ 🇩🇪",
    "combining": "e\u0301 a\u0308 \u1e69 \ufb01 \u212b \u00a0 \u200b \u2028 \ufeff",
    "punctuation": "...!!! ???--- ==== <<>> ``` ''' \"\"\" \\n \\\\ ~@#$%^&*()_+|",
    "contractions": "I'M sure THEY'RE here; we'Ve DON'T y'all'd've",
    "long": "supercalifragilisticexpialidocious" * 3 + "a" * 40 + " " + "0" * 40,
}

_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts outside of any conversation, some of which spell special tokens."""
    spelled = "".join(f"a{token}b {token}\n" for token in _some_special(tokenizer))
    return [*_TEXTS.values(), *([spelled] if spelled else [])]


def conversations(tokenizer: PreTrainedTokenizerBase) -> list[Conversation]:
    """All kinds of conversations; which of them a template refuses is its own affair."""
    made = [
        _conversation(f"the conversation on {name}", ("user", text), ("assistant", text))
        for name, text in _TEXTS.items()
    ]
    spelled = " ".join(_some_special(tokenizer))
    if spelled:
        made.append(
            _conversation(
                "the conversation that spells special tokens",
                ("user", f"What is {spelled}?"),
                ("assistant", f"{spelled} is a special token."),
            )
        )
    return made + plain_conversations() + tool_conversations()


def plain_conversations() -> list[Conversation]:
    """Without tools: roles and turns, blanks around texts, with an answer and without."""
    system = ("system", "You are terse.")
    user, answer = ("user", "How are you today?"), ("assistant", "Very well.")
    return [
        _conversation("a question", user),
        _conversation("a question and its answer", user, answer),
        _conversation("a system message", system, user),
        _conversation("a system message and an answer", system, user, answer),
        _conversation("several turns", user, answer, ("user", "And now?"), ("assistant", "Still.")),
        _conversation("several turns, open", system, user, answer, ("user", "And now?")),
        _conversation("blanks around texts", ("user", "  hello \n"), ("assistant", "\n hi ")),
        _conversation("blanks around all", ("system", " be kind\n"), ("user", "\thello  ")),
        _conversation("lines", ("user", "one\ntwo\n\nthree"), ("assistant", "1\n2\n\n3\n")),
        _conversation("braces", ("user", "{{ .Role }} {% if x %} {{"), ("assistant", "}} {# #}")),
    ]


def tool_conversations() -> list[Conversation]:
    """With a tool, its call and what it returned."""
    ask = Message("user", "How is the weather in Łódź?")
    call = Message("assistant", "", tool_calls=(ToolCall("get_weather", {"city": "Łódź"}),))
    result = Message("tool", '{"sky": "clear"}', name="get_weather")
    return [
        Conversation((ask,), "a tool on offer", tools=(_TOOL,)),
        Conversation((ask, call, result), "a tool's result", tools=(_TOOL,)),
        Conversation(
            (ask, call, result, Message("assistant", "Clear.")), "a tool's use", tools=(_TOOL,)
        ),
    ]


def _conversation(origin: str, *turns: tuple[str, str]) -> Conversation:
    return Conversation(
        tuple(Message(role, content) for role, content in turns),  # type: ignore[arg-type]
        origin,
    )


def _some_special(tokenizer: PreTrainedTokenizerBase, count: int = 4) -> list[str]:
    return [str(token) for token in tokenizer.all_special_tokens][:count]
