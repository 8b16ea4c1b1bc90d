"""`preference`: a better and a worse answer.

    {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}
    {"prompt": [{"role": "user", …}], "chosen": [{"role": "assistant", …}], "rejected": […]}
    {"chosen": [user, assistant], "rejected": [user, assistant]}
    {"conversations": [{"from": "human", …}], "chosen": {"from": "gpt", …}, "rejected": {…}}
    {"instruction": "…", "input": "…", "chosen": "…", "rejected": "…", "system": "…"}

Rules:
- Both answers are of one form: text, one message, or messages. Messages that begin with a
  system or user turn are whole conversations; their prompt is what they share, it ends where
  two answers of the assistant differ, and a `prompt` beside them must be part of it.
- Otherwise the prompt is `prompt`, else `conversations` (or `messages`), else `instruction` as
  in alpaca, else question, query or input; what a column mapping fills goes before these. A
  text before messages is a user turn.
- Where prompt and answers are texts, both are joined as they stand, without a chat template.
  Without a prompt, it is what the two texts share, up to the last white space.
- An answer that is not worse or better than the other, as both are the same, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlora_kit.data.examples import Conversation, Message, Preference, PromptCompletion
from qlora_kit.data.rows import Record
from qlora_kit.data.schemas import alpaca, completion, sharegpt
from qlora_kit.data.schemas.fields import (
    Unfit,
    first_filled,
    full_text,
    is_filled,
    kind,
    one_of,
    optional_text,
)
from qlora_kit.data.schemas.messages import read_messages
from qlora_kit.data.schemas.schema import CONTEXT_KEYS, MINDED_TOOLS, Rules, Schema
from qlora_kit.data.schemas.tools import TOOL_KEYS, tools_of
from qlora_kit.data.schemas.turns import check_order, with_greeting, with_system

_TURNS_KEYS = (*sharegpt.KEYS, "messages")
SAME = "chosen and rejected are the same"
NOTE_REJECTED = "a preference pair: its chosen answer is trained on, the rejected one is not"


def read(record: Record, origin: str, rules: Rules) -> Preference:
    """One row of this schema."""
    pair = _read(record, origin, rules)
    return replace(pair, chosen=replace(pair.chosen, notes=(NOTE_REJECTED,)))


def _read(record: Record, origin: str, rules: Rules) -> Preference:
    answers = _answers(record)
    if isinstance(answers, tuple):
        prompt = _prompt_turns(record, rules)
        if prompt is None:
            return _texts(record, origin, *answers, rules)
        pair = [[*prompt, Message("assistant", text)] for text in answers]
        return _pair(record, origin, pair, len(prompt))
    starts = {messages[0].role for messages in answers}
    if starts <= {"system", "user"}:
        num_given = _shared(*answers)
        _check_prompt(record, answers[0][:num_given], rules)
        return _pair(record, origin, answers, num_given)
    prompt = _prompt_turns(record, rules, or_text=True)
    if prompt is None:
        raise Unfit("no prompt", "chosen begins with an answer")
    return _pair(record, origin, [[*prompt, *answer] for answer in answers], len(prompt))


SCHEMA = Schema(
    name="preference",
    layout="a chosen and a rejected answer",
    slots=(("chosen",), ("rejected",)),
    reads=frozenset(
        {
            "chosen",
            "rejected",
            *_TURNS_KEYS,
            *alpaca.PROMPT_KEYS,
            *completion.PROMPT_KEYS,
            *TOOL_KEYS,
        }
    ),
    read=read,
    minds=(*MINDED_TOOLS, *CONTEXT_KEYS),
)


def _answers(record: Record) -> tuple[str, str] | list[list[Message]]:
    """Both answers: texts, or turns."""
    given = {key: record[key] for key in ("chosen", "rejected")}
    for key, value in given.items():
        if not isinstance(value, str | dict | list | tuple):
            full_text(value, key)
    forms = [kind(value) for value in given.values()]
    if forms[0] != forms[1]:
        detail = f"chosen is {forms[0]}, rejected {forms[1]}"
        raise Unfit("chosen and rejected are of two forms", detail)
    if forms[0] == "a text":
        return full_text(record["chosen"], "chosen"), full_text(record["rejected"], "rejected")
    return [
        read_messages([value] if isinstance(value, dict) else value, key)
        for key, value in given.items()
    ]


def _prompt_turns(record: Record, rules: Rules, or_text: bool = False) -> list[Message] | None:
    """The prompt as turns; a text is one only where the answers are turns (`or_text`)."""
    system = optional_text(record, "system")
    elsewhere = rules.mapped.intersection((*_TURNS_KEYS, "instruction"))
    if elsewhere or not is_filled(record.get("prompt")):
        turns_key = first_filled(record, _TURNS_KEYS)
        if turns_key is not None:
            return with_system(with_greeting(read_messages(record[turns_key], turns_key)), system)
        if record.get("instruction") is not None:
            return alpaca.prompt(record)
    key = one_of(record, completion.PROMPT_KEYS, rules.mapped, "the prompt")
    prompt = record.get(key)
    if isinstance(prompt, list | tuple):
        return with_system(read_messages(prompt, "prompt"), system)
    if or_text and prompt is not None:
        return with_system([Message("user", full_text(prompt, "prompt", key))], system)
    return None


def _pair(
    record: Record, origin: str, pair: Sequence[Sequence[Message]], num_given: int
) -> Preference:
    """Both conversations; they differ behind the first `num_given` messages, if at all."""
    if list(pair[0]) == list(pair[1]):
        raise Unfit(SAME)
    tools = tools_of(record)
    system = optional_text(record, "system")
    chosen, rejected = (with_system(list(messages), system) for messages in pair)
    num_given += len(chosen) - len(pair[0])
    for messages in (chosen, rejected):
        check_order(messages, num_given, may_greet=True)
    return Preference(
        _conversation(chosen, origin, num_given, tools),
        _conversation(rejected, origin, num_given, tools),
        origin,
    )


def _conversation(
    messages: Sequence[Message], origin: str, num_given: int, tools: tuple[Mapping[str, Any], ...]
) -> Conversation:
    return Conversation(tuple(messages), origin, num_given, tools)


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """The number of turns that two whole conversations begin with."""
    if list(chosen) == list(rejected):
        raise Unfit(SAME)
    pairs = list(zip(chosen, rejected, strict=False))
    num_same = next((number for number, (a, b) in enumerate(pairs) if a != b), len(pairs))
    follow = [messages[num_same : num_same + 1] for messages in (chosen, rejected)]
    if num_same == 0 or any(not one or one[0].role != "assistant" for one in follow):
        detail = f"they differ from turn {num_same + 1} on, which is not an answer of both"
        raise Unfit("chosen and rejected answer different prompts", detail)
    return num_same


def _check_prompt(record: Record, shared: Sequence[Message], rules: Rules) -> None:
    """A prompt beside whole conversations says nothing new, or the row contradicts itself."""
    key = one_of(record, completion.PROMPT_KEYS, rules.mapped, "the prompt")
    prompt = record.get(key)
    if not is_filled(prompt):
        return
    if isinstance(prompt, list | tuple):
        fits = read_messages(prompt, "prompt") == list(shared[: len(prompt)])
    else:
        text = full_text(prompt, "prompt", key).strip()
        fits = any(turn.role == "user" and turn.content.strip() == text for turn in shared)
    if not fits:
        raise Unfit("the prompt is not that of the conversations", key)


def _texts(record: Record, origin: str, chosen: str, rejected: str, rules: Rules) -> Preference:
    if chosen == rejected:
        raise Unfit(SAME)
    completion.refuse_beside_texts(record)
    if optional_text(record, "system"):
        hint = "with columns: {instruction: prompt} the row is a conversation"
        raise Unfit("no place for system", f"two texts without a chat template; {hint}")
    key = one_of(record, completion.PROMPT_KEYS, rules.mapped, "the prompt")
    if record.get(key) is not None:
        prompt = full_text(record[key], "prompt", key)
    else:
        prompt = _shared_text(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        for name, answer in ("chosen", chosen), ("rejected", rejected):
            full_text(answer, name, f"{name} behind what both share")
    return Preference(
        PromptCompletion(prompt, chosen, origin, rules.split_special_tokens),
        PromptCompletion(prompt, rejected, origin, rules.split_special_tokens),
        origin,
    )


def _shared_text(chosen: str, rejected: str) -> str:
    """What both begin with, up to the white space before the first word that differs."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = chosen[: next((number for number, (a, b) in pairs if a != b), len(rejected))]
    prompt = shared.rstrip()
    if prompt == shared:
        whole_words = shared.rsplit(None, 1)
        prompt = whole_words[0] if len(whole_words) == 2 else ""
    if not prompt:
        raise Unfit("no prompt", "chosen and rejected share no text, and there is no prompt")
    return prompt
