"""`qlora-kit chat RUN|MODEL`: talk to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import TextIOWrapper
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.cli.arguments import AllowPickle, Force, SubjectName, TrustRemoteCode
from qlora_kit.cli.reading import model_spec
from qlora_kit.data.examples import AnyExample, Conversation, Message
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from qlora_kit.recipe import Recipe
    from qlora_kit.report.reporter import Reporter
    from qlora_kit.subject import Subject

NAME = "chat"

_ROWS_LOOKED_AT = 1000
_HELP = "/reset starts anew, /exit or Ctrl-D ends; Ctrl-C stops an answer."


def command(
    subject: SubjectName,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told beforehand.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    force: Force = False,
) -> None:
    """Talk to a run or a model; lines that are piped in are answered one by one."""
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.subject import load_subject

    reporter = console_reporter(to_stderr=True)
    read_as = model_spec(subject, trust_remote_code, allow_pickle)
    loaded = load_subject(subject, read_as, force, reporter)
    trained = first_examples(loaded.recipe) if loaded.recipe is not None else []
    is_conversation = bool(loaded.base.tokenizer.chat_template)
    why = "The tokenizer has no chat template"
    if trained and not any(isinstance(one, Conversation) for one in trained):
        is_conversation = False
        why = "It was trained on text without a chat template"
    if system is not None and not is_conversation:
        raise DataError(f"--system needs a conversation. {why}: put the text into your prompt.")
    if not is_conversation:
        reporter.say(f"{why}: each line is continued as plain text.")
    if sys.stdin.isatty():
        reporter.say(f"{loaded.name} listens. {_HELP}")
    if system is None and is_conversation:
        system = trained_system_message(trained)
        if system is not None and sys.stdin.isatty():
            reporter.say(f"As in training, it is told beforehand: {system}")
    before = [Message("system", system)] if system is not None else []
    if not converse(loaded, before, is_conversation, max_new_tokens, temperature, reporter):
        raise typer.Exit(1)


def first_examples(recipe: Recipe) -> list[AnyExample]:
    """What the first training rows say; nothing where they have moved since."""
    from qlora_kit.data.prepare import read_examples
    from qlora_kit.errors import QloraKitError

    try:
        return list(islice(read_examples(recipe.data.train), _ROWS_LOOKED_AT))
    except QloraKitError:
        return []


def trained_system_message(examples: Sequence[AnyExample]) -> str | None:
    """The system message that every training row begins with; None where they differ."""
    messages = {
        one.messages[0].content
        if isinstance(one, Conversation) and one.messages[0].role == "system"
        else None
        for one in examples
    }
    return messages.pop() if len(messages) == 1 else None


def converse(
    subject: Subject,
    before: list[Message],
    is_conversation: bool,
    max_new_tokens: int,
    temperature: float,
    reporter: Reporter,
) -> bool:
    """Answer line after line until they end; whether each one could be answered.

    `before` holds the messages that every conversation begins with. Where it is no conversation,
    each line is a text to be continued.
    """
    from qlora_kit.chat import prompt_ids, room_for_answer, stream_reply

    messages = list(before)
    splits = subject.recipe is None or subject.recipe.data.split_special_tokens
    all_answered = True
    for line in _lines():
        if line.strip() == "/exit":
            break
        if line.strip() == "/reset":
            messages = list(before)
            reporter.say("(a new conversation)")
            continue
        asked = [*messages, Message("user", line)]
        input_ids = prompt_ids(subject.base.tokenizer, asked, is_conversation, splits)
        room = room_for_answer(subject, input_ids)
        if room is not None and room <= 0:
            all_answered = False
            reporter.warn(_context_full(len(input_ids), room, bool(messages[len(before) :])))
            continue
        reply = stream_reply(subject, input_ids, _write, max_new_tokens, temperature)
        _write("\n")
        if reply.ending == "interrupted" and not sys.stdin.isatty():
            raise KeyboardInterrupt
        if reply.ending == "length":
            reporter.say(f"(cut at {max_new_tokens} tokens; --max-new-tokens allows more)")
        elif reply.ending == "context":
            reporter.warn("the model's context is full: the answer ends here; /reset starts anew.")
        if reply.text or reply.ending != "interrupted":
            messages = [*asked, Message("assistant", reply.text)]
    return all_answered


def _context_full(num_tokens: int, room: int, has_history: bool) -> str:
    what = "the conversation" if has_history else "this line"
    return (
        f"{what} has {num_tokens} tokens, and the model's context holds {num_tokens + room}: "
        "there is no room for an answer. "
        + ("/reset starts anew." if has_history else "Give a shorter one.")
    )


def _lines() -> Iterator[str]:
    """What the user says, line by line, empty lines left out; ends with the input."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history, where the system has it
    while True:
        try:
            line = _ask()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(f"\n{_HELP}", file=sys.stderr)
            continue
        if line.strip():
            yield line


def _ask() -> str:
    """One line from the terminal; the prompt stays off a redirected standard output."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _write(text: str) -> None:
    print(text, end="", flush=True)
