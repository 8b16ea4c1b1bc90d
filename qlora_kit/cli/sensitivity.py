"""`qlora-kit sensitivity MODEL`: what each layer costs when it alone is quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qlora_kit.cli.arguments import AllowPickle, AsJson, TrustRemoteCode

if TYPE_CHECKING:
    from qlora_kit.quantize.mixed_base import Chosen
    from qlora_kit.quantize.progressive import Descent
    from qlora_kit.quantize.sensitivity.measure import Sensitivity

NAME = "sensitivity"


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model in 16 or 32 bits: folder or hub id.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows to measure on: a recipe (its data.train), a text file, any file of rows, "
            "or demo/commands.",
        ),
    ] = None,
    cheap: Annotated[
        bool, typer.Option("--cheap", help="Estimate all layers in one pass of activations.")
    ] = False,
    check: Annotated[
        int, typer.Option(min=0, help="With --cheap: measure this many, and compare the order.")
    ] = 0,
    by: Annotated[
        Literal["layer", "kind", "block"], typer.Option(help="What is quantized together.")
    ] = "layer",
    method: Annotated[
        Literal["nf4", "fp4", "int4", "int8"], typer.Option(help="What it is quantized to.")
    ] = "nf4",
    block_size: Annotated[int, typer.Option(help="Numbers that share a scale.")] = 64,
    double_quant: Annotated[
        bool, typer.Option(help="Quantize the scales of nf4 and fp4 too.")
    ] = True,
    num_tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure on.")] = 1024,
    window_tokens: Annotated[int, typer.Option(min=8, help="Tokens of a row at most.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of which rows are taken.")] = 42,
    stability: Annotated[
        bool, typer.Option("--stability", help="Rank on other rows too, and compare the order.")
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="Choose bits per layer within this memory: 5.0GiB, 600MB."),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Choose the smallest mixture within this KL.")
    ] = None,
    progressive: Annotated[
        bool,
        typer.Option(
            "--progressive", help="With --max-kl: 16 → 8 → 4 bits in steps, as far as it holds."
        ),
    ] = False,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps from one width to the next, with --progressive.")
    ] = 4,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Weights alone: nothing is run, NaN are counted.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Rows of the tables.")] = 20,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to make, with sensitivity.json, heat-map.png and recipe.yaml."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Quantize one layer at a time, rank them, and choose which ones keep more bits."""
    if budget is not None and max_kl is not None:
        raise typer.BadParameter("--budget and --max-kl both choose a mixture; give one of them.")
    if progressive and max_kl is None:
        raise typer.BadParameter("--progressive stops at a budget of quality; give --max-kl.")
    if data is None and not statistics:
        raise typer.BadParameter("name rows to measure on with --data, such as a text file.")
    budget_bytes = None if budget is None else parse_bytes(budget)
    if check and not cheap:
        raise typer.BadParameter("--check measures some of what --cheap estimates; add --cheap.")

    from qlora_kit.cli.console import console_reporter
    from qlora_kit.quantize.rounding import Rounding
    from qlora_kit.recipe import ModelSpec
    from qlora_kit.report import sensitivity as report

    rounding = Rounding(method, block_size, double_quant)
    spec = ModelSpec(
        name_or_path=model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    reporter = console_reporter(to_stderr=as_json)
    if statistics:
        from dataclasses import asdict

        from qlora_kit.quantize.sensitivity.stored import stored_statistics

        layers = stored_statistics(spec, rounding, reporter)
        if as_json:
            print(json.dumps([asdict(one) for one in layers], indent=2))
        else:
            report.statistics(reporter, layers, top)
        raise typer.Exit(1 if any(one.num_non_finite for one in layers) else 0)

    from qlora_kit.quantize.sensitivity.run import Request, run_sensitivity

    assert data is not None
    found, chosen = run_sensitivity(
        spec,
        Request(
            data=data,
            rounding=rounding,
            by=by,
            is_exact=not cheap,
            check=check,
            num_tokens=num_tokens,
            window_tokens=window_tokens,
            seed=seed,
            stability=stability,
            budget_bytes=budget_bytes,
            max_kl=max_kl,
            num_steps=steps if progressive else None,
            out=out,
        ),
        reporter,
    )
    values = _values(model, found, chosen)
    if out is not None:
        _write(out, values, found, chosen)
    if as_json:
        print(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        report.ranking(reporter, found, top)
        report.statistics(reporter, found.statistics, min(top, 5))
        if chosen is not None:
            report.chosen(reporter, chosen)
            reporter.say("")
            reporter.say(_fragment(chosen))
        if out is not None:
            reporter.say(f"Everything is in {out}.")


def parse_bytes(text: str) -> int:
    """`5.0GiB`, `600 MB`.

    Raises:
        BadParameter: it is no size.
    """
    from qlora_kit.recipe.size import size_bytes

    found = size_bytes(text)
    if found is None:
        raise typer.BadParameter(f"--budget must be a size such as 5.0GiB or 600MB, got {text}.")
    return found


def _values(model: str, found: Sensitivity, chosen: Chosen | Descent | None) -> dict[str, Any]:
    mixture = None if chosen is None else chosen.as_dict()
    return {"model": model, **found.as_dict(), "mixture": mixture}


def _fragment(chosen: Chosen | Descent) -> str:
    """The section of a recipe that loads the mixture."""
    from qlora_kit.recipe.yaml import dump_yaml

    return dump_yaml({"quantization": dict(chosen.quantization)})


def _write(
    out: Path, values: dict[str, Any], found: Sensitivity, chosen: Chosen | Descent | None
) -> None:
    from qlora_kit.atomic import published_folder
    from qlora_kit.report.sensitivity import heat_map

    with published_folder(out) as draft:
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (draft / "sensitivity.json").write_text(text + "\n", encoding="utf-8")
        heat_map(found, draft / "heat-map.png")
        if chosen is not None:
            (draft / "recipe.yaml").write_text(_fragment(chosen), encoding="utf-8")
