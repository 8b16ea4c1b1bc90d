"""Options of `qlora-kit export`; --targets answers by itself, and nothing is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_kit.cli.arguments import budget_of_kl


def _show_targets(wanted: bool) -> None:
    """Every target with what it is."""
    if not wanted:
        return
    from qlora_kit.export.targets import known_targets

    for name, summary in known_targets().items():
        print(f"{name:30} {summary}")
    raise typer.Exit


To = Annotated[
    list[str],
    typer.Option(
        metavar="TARGET",
        help="adapter, merged, gguf[:TYPE], lora-gguf, ollama, onnx, gptq, nf4 … (--targets "
        "lists them); may be given several times.",
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Where to; unset: exports/TARGET in the run's folder.")
]
Base = Annotated[
    Literal["auto", "dequantized", "original"] | None,
    typer.Option(
        help="What is merged into; auto: the original weights where few bits are left, else "
        "the merge that is there."
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        callback=budget_of_kl, help="Budget: mean KL in nats per token from the trained model."
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text for what is calibrated, instead of the run's training rows."),
]
Targets = Annotated[
    bool,
    typer.Option("--targets", help="List them.", is_eager=True, callback=_show_targets),
]
