"""`qlora-kit quantize MODEL --method M --out DIR`: quantize, reload, compare, certify."""

from __future__ import annotations

import json

import typer

from qlora_kit.cli.arguments import (
    AllowPickle,
    AsJson,
    CalibrationTokens,
    MethodOptions,
    Seed,
    TrustRemoteCode,
)
from qlora_kit.cli.options import quantize as options
from qlora_kit.cli.reading import model_spec

NAME = "quantize"


def command(
    model: options.Model,
    method: options.Method,
    out: options.Out,
    settings: MethodOptions = None,
    calibration: options.Calibration = None,
    calibration_tokens: CalibrationTokens = None,
    calibration_length: options.CalibrationLength = None,
    sampling: options.Sampling = "random",
    seed: Seed = 42,
    data: options.Data = None,
    max_tokens: options.MaxTokens = 4096,
    max_kl: options.MaxKl = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    methods: options.Methods = False,
    describe: options.Describe = None,
) -> None:
    """Quantize a model, load the result again, and compare it with the model it was made from."""
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.export.sixteen_bit import sixteen_bit
    from qlora_kit.quantize.calibration import CalibrationSpec
    from qlora_kit.quantize.held_out import Named
    from qlora_kit.quantize.quantize import Request, quantize, require_sound
    from qlora_kit.report.quantized import quantized

    reporter = console_reporter(to_stderr=as_json)
    spec = CalibrationSpec(
        num_tokens=calibration_tokens, max_length=calibration_length, sampling=sampling, seed=seed
    )
    read_as = model_spec(model, trust_remote_code, allow_pickle)
    request = Request(
        model=read_as,
        method=method,
        out=out,
        options=tuple(settings or ()),
        texts=Named(calibration, data),
        calibration=spec,
        max_tokens=max_tokens,
        max_kl=max_kl,
    )
    require_sound(request)
    with sixteen_bit(request, reporter) as resolved:
        certificate = quantize(resolved, reporter)
    if as_json:
        print(json.dumps(certificate, indent=2, ensure_ascii=False))
    else:
        quantized(reporter, certificate, str(out))
    raise typer.Exit(0 if certificate["passed"] else 1)
