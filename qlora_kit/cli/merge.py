"""`qlora-kit merge RUN`: merge, measure, certify."""

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
    budget_above_zero,
)
from qlora_kit.cli.reading import model_spec

NAME = "merge"


def command(
    run: AdapterPath,
    out: Annotated[
        Path | None, typer.Option(help="Where to; unset: `merged` in the run's folder.")
    ] = None,
    base: Annotated[
        Literal["auto", "dequantized", "original"] | None,
        typer.Option(
            help="dequantized: the graph that was trained; original: the 16-bit weights; auto: "
            "the lower held-out loss of those within --max-kl."
        ),
    ] = None,
    dtype: MergeDtype = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            callback=budget_above_zero,
            help="Budget: mean KL in nats per token from the trained graph.",
        ),
    ] = None,
    requantize: Annotated[
        Literal["nf4", "fp4"] | None,
        typer.Option(help="Quantize the result again; most of a light adapter does not survive."),
    ] = None,
    data: HeldOutRows = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Add an adapter to its base, and measure the result against what was trained."""
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.environment import probe_hardware
    from qlora_kit.export.merge import require_absent
    from qlora_kit.export.merge_run import merge_reopened
    from qlora_kit.export.places import merge_options_of
    from qlora_kit.export.reopen import reopen_adapter
    from qlora_kit.report import narrate

    options = merge_options_of(run, base=base, dtype=dtype, max_kl=max_kl)
    target = out or run / "merged"
    require_absent(target)
    reporter = console_reporter(to_stderr=as_json)
    hardware = probe_hardware()
    read_as = model_spec(str(run), trust_remote_code, allow_pickle)
    reopened = reopen_adapter(
        run, hardware, data=data, force=force, read_as=read_as, reporter=reporter
    )
    certificate = merge_reopened(
        reopened, target, options, hardware, requantize_to=requantize, reporter=reporter
    )
    if as_json:
        print(json.dumps(certificate, indent=2, ensure_ascii=False))
    else:
        narrate.certificate(reporter, certificate)
        reporter.say(f"The merged model is in {target}.")
    raise typer.Exit(0 if certificate["passed"] else 1)
