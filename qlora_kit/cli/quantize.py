"""`qlora-kit quantize MODEL --method M --out DIR`: quantize, reload, compare, certify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_kit.cli.arguments import AllowPickle, AsJson, TrustRemoteCode
from qlora_kit.quantize.methods import METHODS

NAME = "quantize"


def _show_methods(wanted: bool) -> None:
    """Every method with its summary."""
    if not wanted:
        return
    for name, entry in METHODS.items():
        print(f"{name:9} {entry.summary}")
    print("--describe METHOD tells a method's options.")
    raise typer.Exit


def _describe(name: str | None) -> None:
    """The options of one method."""
    if name is None:
        return
    from qlora_kit.quantize.methods import any_of, entry_of
    from qlora_kit.quantize.options import describe_options

    method = any_of(name)
    print(f"{name}: {entry_of(method.name).summary}")
    for option, default, meaning in describe_options(method.options):
        print(f"\n{option}={default}\n    {meaning}")
    if not method.options.model_fields:
        print("\nIt has no options.")
    raise typer.Exit


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RUN", help="A model in 16 or 32 bits; of a run, its 16-bit merge."
        ),
    ],
    method: Annotated[
        str, typer.Option(help="nf4, fp4, llm-int8, int8, gptq, awq, gguf:TYPE, onnx …")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE …", help="The method's options, as block_size=32."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text to calibrate on: a recipe, a file, wikitext2, c4, a hub data set."),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=2, help="How much of it; unset: up to 16384 tokens.")
    ] = None,
    calibration_length: Annotated[
        int, typer.Option(min=8, help="Tokens that are read at once; longer rows are cut.")
    ] = 512,
    sampling: Annotated[
        Literal["whole", "random", "by-source", "by-length"],
        typer.Option(help="From the start, at random, or evenly over sources or lengths."),
    ] = "random",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seeds the drawing.")] = 42,
    data: Annotated[
        str | None,
        typer.Option(help="Held-out text to compare on: a recipe (its eval rows), a file …"),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of it that are compared, at most.")
    ] = 4096,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0, help="Budget: mean KL in nats per token from the source; exit 1 above it."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    methods: Annotated[
        bool,
        typer.Option("--methods", help="List the methods.", is_eager=True, callback=_show_methods),
    ] = False,
    describe: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD", help="Tell a method's options.", is_eager=True, callback=_describe
        ),
    ] = None,
) -> None:
    """Quantize a model, load the result again, and compare it with the model it was made from."""
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.export.sixteen_bit import sixteen_bit
    from qlora_kit.quantize.calibration import CalibrationSpec
    from qlora_kit.quantize.held_out import Named
    from qlora_kit.quantize.quantize import Request, quantize, require_sound
    from qlora_kit.recipe import ModelSpec
    from qlora_kit.report.quantized import quantized

    reporter = console_reporter(to_stderr=as_json)
    spec = CalibrationSpec(
        num_tokens=calibration_tokens, max_length=calibration_length, sampling=sampling, seed=seed
    )
    read_as = ModelSpec(
        name_or_path=model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    request = Request(
        model=read_as,
        method=method,
        out=out,
        options=tuple(options or ()),
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
