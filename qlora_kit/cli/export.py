"""`qlora-kit export RUN --to TARGET`: make what is deployed, and measure the whole chain to it."""

from __future__ import annotations

import json

import typer

from qlora_kit.cli.arguments import (
    AdapterPath,
    AllowPickle,
    AsJson,
    CalibrationTokens,
    Force,
    HeldOutRows,
    MergeDtype,
    MethodOptions,
    Seed,
    TrustRemoteCode,
)
from qlora_kit.cli.options import export as options
from qlora_kit.cli.reading import model_spec

NAME = "export"


def command(
    run: AdapterPath,
    to: options.To,
    settings: MethodOptions = None,
    out: options.Out = None,
    base: options.Base = None,
    dtype: MergeDtype = None,
    max_kl: options.MaxKl = None,
    data: HeldOutRows = None,
    calibration: options.Calibration = None,
    calibration_tokens: CalibrationTokens = None,
    seed: Seed = 42,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    force: Force = False,
    as_json: AsJson = False,
    targets: options.Targets = False,
) -> None:
    """Export a trained adapter, and show what each step cost in one table."""
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.export.jobs import ExportRequest, sound_jobs
    from qlora_kit.export.places import merge_options_of, places_of
    from qlora_kit.export.targets import parse_target
    from qlora_kit.quantize.calibration import CalibrationSpec

    request = ExportRequest(
        targets=tuple(parse_target(name) for name in to),
        out=out,
        options=tuple(settings or ()),
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
    read_as = model_spec(str(run), trust_remote_code, allow_pickle)
    reopened = reopen_adapter(
        run, hardware, data=data, force=force, read_as=read_as, reporter=reporter
    )
    certificates = export_reopened(reopened, request, places, hardware, reporter)
    if as_json:
        print(json.dumps(certificates, indent=2, ensure_ascii=False))
    raise typer.Exit(0 if all(one["passed"] for one in certificates) else 1)
