"""The command line: one file per verb; the only place that prints or exits."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Annotated, Any

import typer
from safetensors import SafetensorError

import qlora_kit
from qlora_kit.cli import (
    chat,
    check,
    compare,
    data,
    dequantize,
    doctor,
    evaluate,
    export,
    merge,
    plan,
    prove_resume,
    quantize,
    recipes,
    sensitivity,
    train,
    verify,
)
from qlora_kit.cli.terminated import Terminated, ended_by_sigterm, left_as_it_was
from qlora_kit.environment import require_known_switches, require_one_process, settle_upstream
from qlora_kit.errors import QloraKitError
from qlora_kit.refusals import refusal_of

# A launcher ends all processes when the first has failed; the one that tells may be slower.
_TELLING_SECONDS = 10.0
_IN_SEVERAL_PROCESSES = (train.NAME,)

app = typer.Typer(
    name="qlora-kit",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """A verb that says so when it is interrupted from the keyboard, where Typer ends without a
    word, and that puts away what it has begun after SIGTERM too. Training answers that itself.
    """
    answering = nullcontext if command is train.command else ended_by_sigterm

    @wraps(command)
    def say_so(*arguments: Any, **options: Any) -> None:
        try:
            with answering():
                command(*arguments, **options)
        except Terminated:
            print("terminated", file=sys.stderr)
            raise
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return say_so


def _launched_rightly(name: str, command: Callable[..., None]) -> Callable[..., None]:
    """A verb that says so when a launcher has started it several times."""
    if name in _IN_SEVERAL_PROCESSES:
        return command

    @wraps(command)
    def alone(*arguments: Any, **options: Any) -> None:
        require_one_process(name)
        command(*arguments, **options)

    return alone


for verb in (
    check,
    data,
    plan,
    train,
    prove_resume,
    evaluate,
    compare,
    merge,
    export,
    quantize,
    dequantize,
    sensitivity,
    verify,
    chat,
    recipes,
    doctor,
):
    app.command(name=verb.NAME)(_launched_rightly(verb.NAME, interruptible(verb.command)))


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True)
    ] = False,
) -> None:
    """QLoRA fine-tuning from one YAML recipe to a merged, measured and certified model."""
    if version:
        print(qlora_kit.__version__)
        raise typer.Exit


def main() -> None:
    """Run a verb. Exit code 0: what was asked holds; 1: a fault or a finding; 2: bad usage."""
    settle_upstream()
    with left_as_it_was(signal.SIGTERM):
        _tell_faults()


def _tell_faults() -> None:
    try:
        require_known_switches()
        app()
    except QloraKitError as error:
        if error.is_told_elsewhere:
            time.sleep(_TELLING_SECONDS)
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(141)
    except (OSError, SafetensorError, RuntimeError) as error:
        refusal = refusal_of(error)
        if refusal is None:
            raise
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(1)
