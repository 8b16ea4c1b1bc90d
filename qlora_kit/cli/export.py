"""`qlora-kit export RUN --to TARGET`: make what is deployed, and measure the whole chain to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_kit.cli.arguments import (
    AdapterPath,
    AllowPickle,
    AsJson,
    Force,
    HeldOutRows,
    MergeDtype,
    TrustRemoteCode,
)

NAME = "export"


def _show_targets(wanted: bool) -> None:
    """Every target with what it is."""
    if not wanted:
        return
    from qlora_kit.export.targets import known_targets

    for name, summary in known_targets().items():
        print(f"{name:30} {summary}")
    raise typer.Exit


def command(
    run: AdapterPath,
    to: Annotated[
        list[str],
        typer.Option(
            metavar="TARGET",
            help="adapter, merged, gguf[:TYPE], lora-gguf, ollama, onnx, gptq, nf4 … (--targets "
            "lists them); may be given several times.",
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE …", help="The method's options, as block_size=32."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to; unset: exports/TARGET in the run's folder.")
    ] = None,
    base: Annotated[
        Literal["auto", "dequantized", "original"] | None,
        typer.Option(
            help="What is merged into; auto: the original weights where few bits are left, else "
            "the merge that is there."
        ),
    ] = None,
    dtype: MergeDtype = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Budget: mean KL in nats per token from the trained model."),
    ] = None,
    data: HeldOutRows = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text for what is calibrated, instead of the run's training rows."),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="How much of it; unset: up to 16384 tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seeds the drawing of calibration text.")] = 42,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    force: Force = False,
    as_json: AsJson = False,
    targets: Annotated[
        bool,
        typer.Option("--targets", help="List them.", is_eager=True, callback=_show_targets),
    ] = False,
) -> None:
    """Export a trained adapter, and show what each step cost in one table."""
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.export.jobs import ExportRequest, sound_jobs
    from qlora_kit.export.places import merge_options_of, places_of
    from qlora_kit.export.targets import parse_target
    from qlora_kit.quantize.calibration import CalibrationSpec
    from qlora_kit.recipe import ModelSpec

    request = ExportRequest(
        targets=tuple(parse_target(name) for name in to),
        out=out,
        options=tuple(options or ()),
        base=base,
        merge=merge_options_of(run, dtype=dtype),
        max_kl=max_kl,
        calibration=calibration,
        calibration_spec=CalibrationSpec(num_tokens=calibration_tokens, seed=seed),
    )
    places = places_of(run)
    sound_jobs(request, places)

    from qlora_kit.environment import probe_hardware
    from qlora_kit.export.export import export_reopened
    from qlora_kit.export.reopen import reopen_adapter

    reporter = console_reporter(to_stderr=as_json)
    hardware = probe_hardware()
    read_as = ModelSpec(
        name_or_path=str(run), trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    reopened = reopen_adapter(
        run, hardware, data=data, force=force, read_as=read_as, reporter=reporter
    )
    certificates = export_reopened(reopened, request, places, hardware, reporter)
    if as_json:
        print(json.dumps(certificates, indent=2, ensure_ascii=False))
    raise typer.Exit(0 if all(one["passed"] for one in certificates) else 1)
