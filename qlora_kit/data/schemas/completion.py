"""`prompt_completion`: a prompt, and how it goes on.

    {"prompt": "Q: 1 + 1\\nA:", "completion": " 2"}
    {"prompt": [{"role": "user", …}], "completion": [{"role": "assistant", …}]}

Rules:
- The prompt may be called question, query or input, the completion response, output, answer or
  target. Where two of these are there, none is guessed; a column mapping says which.
- Two texts are joined as they stand, without a chat template. Two lists of messages are a
  conversation, of which the prompt is given: its answers are not trained on.
- An instruction, a system prompt or a context beside two texts is refused; with a column mapping to
  instruction, input, output and system such rows are conversations.
"""

from __future__ import annotations

from qlora_kit.data.examples import Conversation, PromptCompletion
from qlora_kit.data.rows import Record
from qlora_kit.data.schemas.fields import Unfit, full_text, kind, one_of
from qlora_kit.data.schemas.messages import read_messages
from qlora_kit.data.schemas.schema import CONTEXT_KEYS, MINDED_TOOLS, Rules, Schema
from qlora_kit.data.schemas.tools import TOOL_KEYS, tools_of
from qlora_kit.data.schemas.turns import check_order

PROMPT_KEYS = ("prompt", "question", "query", "input")
COMPLETION_KEYS = ("completion", "response", "output", "answer", "target")


def read(record: Record, origin: str, rules: Rules) -> Conversation | PromptCompletion:
    """One row of this schema."""
    prompt_key = one_of(record, PROMPT_KEYS, rules.mapped, "the prompt")
    completion_key = one_of(record, COMPLETION_KEYS, rules.mapped, "the completion")
    prompt, completion = record[prompt_key], record[completion_key]
    if isinstance(completion, dict):
        completion = [completion]
    if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
        given = read_messages(prompt, "prompt")
        messages = (*given, *read_messages(completion, "completion"))
        check_order(messages, len(given), rules.needs_answer)
        return Conversation(messages, origin, len(given), tools_of(record))
    forms = {kind(prompt), kind(completion)}
    if forms == {"a list", "a text"}:
        detail = f"{prompt_key} is {kind(prompt)}, {completion_key} {kind(completion)}"
        raise Unfit("prompt and completion are of two forms", detail)
    text = full_text(prompt, "prompt", prompt_key)
    answer = full_text(completion, "completion", completion_key)
    refuse_beside_texts(record)
    return PromptCompletion(text, answer, origin, rules.split_special_tokens)


def refuse_beside_texts(record: Record) -> None:
    """Raise Unfit where two texts come with tools, which only a conversation can have."""
    if tools_of(record):
        raise Unfit("no place for tools", "two texts without a chat template have no place for it")


SCHEMA = Schema(
    name="prompt_completion",
    layout="a prompt and how it goes on, two texts or two lists of messages",
    slots=(PROMPT_KEYS, COMPLETION_KEYS),
    reads=frozenset({*PROMPT_KEYS, *COMPLETION_KEYS, *TOOL_KEYS}),
    read=read,
    minds=(*MINDED_TOOLS, *CONTEXT_KEYS, "instruction"),
)
