"""One answer to a conversation, handed on word by word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from qlora_kit.data.examples import Conversation, Message, PromptCompletion
from qlora_kit.data.render import end_of_turn_id, render_prompt
from qlora_kit.errors import DataError
from qlora_kit.runtime.forward import context_tokens, evaluation_mode, inference_context
from qlora_kit.runtime.greedy import greedy_config, own_settings_aside
from qlora_kit.subject import Subject

_ORIGIN = "the chat"


@dataclass(frozen=True)
class Reply:
    """What the model said, and why it ended there.

    `ending`: the model stopped by itself, reached `max_new_tokens`, filled its context, or was
    interrupted from the keyboard.
    """

    text: str
    ending: Literal["stopped", "length", "context", "interrupted"]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    is_conversation: bool = True,
    split_special_tokens: bool = True,
) -> tuple[int, ...]:
    """A conversation as the model is to see it; else the last message alone, as it stands.

    `split_special_tokens` as the recipe has it: whether what that one spells of them is text.

    Raises:
        DataError: the template refuses the conversation, or no token comes of it.
    """
    if is_conversation:
        asked = (*messages, Message("assistant", ""))
        prompt = render_prompt(Conversation(asked, _ORIGIN), tokenizer)
    else:
        asked_for = PromptCompletion(messages[-1].content, "", _ORIGIN, split_special_tokens)
        prompt = render_prompt(asked_for, tokenizer)
    if prompt is None or not prompt.input_ids:
        raise DataError("the tokenizer makes no token of this line, so there is nothing to answer.")
    return prompt.input_ids


def room_for_answer(subject: Subject, input_ids: Sequence[int]) -> int | None:
    """Tokens left in the model's context, zero or fewer where it is full; None without a limit."""
    limit = context_tokens(subject.model)
    return None if limit is None else limit - len(input_ids)


def stream_reply(
    subject: Subject,
    input_ids: Sequence[int],
    write: Callable[[str], None],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> Reply:
    """Answer a prompt that leaves room; `write` gets the text as it grows.

    Greedy at temperature 0, else sampled. Ctrl-C ends the answer, with what was said so far.
    """
    base = subject.base
    room = room_for_answer(subject, input_ids)
    assert input_ids, "an empty prompt cannot be answered"
    assert room is None or room > 0, "the caller checks the room"
    limit = max_new_tokens if room is None else min(max_new_tokens, room)
    stops = turn_ends(subject)
    config = greedy_config(limit, stops, base.tokenizer.pad_token_id)
    if temperature > 0:
        config.do_sample = True
        config.temperature = temperature
    streamer = _Writer(base.tokenizer, stops, write)
    ids = torch.tensor([list(input_ids)], device=subject.model.device)
    try:
        with (
            evaluation_mode(subject.model),
            own_settings_aside(subject.model),
            inference_context(subject.model.device, base.compute_dtype),
        ):
            subject.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=streamer,
            )
    except KeyboardInterrupt:
        streamer.end()
        return Reply(streamer.text, "interrupted")
    if streamer.stopped:
        return Reply(streamer.text, "stopped")
    return Reply(streamer.text, "length" if limit == max_new_tokens else "context")


def turn_ends(subject: Subject) -> frozenset[int]:
    """Where generation stops: the model's own ids, and the token its template ends a turn with.

    A model whose generation config forgot the latter would go on to speak for the user.
    """
    stops = subject.base.stop_ids
    try:
        return stops | {end_of_turn_id(subject.base.tokenizer)}
    except DataError:  # no template, or one that ends turns with no special token
        return stops


class _Writer(TextStreamer):
    """Hands on what `generate` pushes, whole words at a time, up to the end of the turn."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: frozenset[int],
        write: Callable[[str], None],
    ):
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self.text = ""
        self.stopped = False
        self._stops = stops
        self._write = write

    def put(self, value: torch.Tensor) -> None:
        self.stopped = not self.next_tokens_are_prompt and int(value.flatten()[-1]) in self._stops
        if not self.stopped:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.text += text
            self._write(text)
