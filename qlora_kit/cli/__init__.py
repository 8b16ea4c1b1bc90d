"""The command line: one file per verb; the only place that prints or exits."""

from __future__ import annotations

import sys

import typer

from qlora_kit.cli import chat, check, data, dequantize, doctor, evaluate, merge, recipes, train
from qlora_kit.environment import quiet_upstream
from qlora_kit.errors import QloraKitError

app = typer.Typer(
    name="qlora-kit",
    help="QLoRA fine-tuning from one YAML recipe to a merged, measured and certified model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (check, data, train, evaluate, merge, dequantize, chat, recipes, doctor):
    app.command(name=verb.NAME)(verb.command)


def main() -> None:
    """Run a verb. Exit code 0: what was asked holds; 1: a fault or a finding; 2: bad usage."""
    quiet_upstream()
    try:
        app()
    except QloraKitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
