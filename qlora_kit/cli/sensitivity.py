"""`qlora-kit sensitivity MODEL`: what each layer costs when it alone is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from qlora_kit.cli.arguments import (
    AllowPickle,
    AsJson,
    Seed,
    TrustRemoteCode,
    given_options,
    parse_bytes,
    refuse_unused,
)
from qlora_kit.cli.options import sensitivity as options
from qlora_kit.cli.reading import model_spec
from qlora_kit.records import json_text

if TYPE_CHECKING:
    from qlora_kit.quantize.mixed_base import Chosen
    from qlora_kit.quantize.progressive import Descent
    from qlora_kit.quantize.rounding import Rounding
    from qlora_kit.quantize.sensitivity.measure import Sensitivity
    from qlora_kit.recipe import ModelSpec
    from qlora_kit.report.reporter import Reporter

NAME = "sensitivity"
STATISTICS_FILE = "statistics.json"


# What is of no use where nothing is run.
_OF_RUNNING = (
    "data",
    "cheap",
    "check",
    "by",
    "num_tokens",
    "window_tokens",
    "seed",
    "stability",
    "budget",
    "max_kl",
    "progressive",
    "steps",
)


def command(
    context: typer.Context,
    model: options.Model,
    data: options.Data = None,
    cheap: options.Cheap = False,
    check: options.Check = 0,
    by: options.By = "layer",
    method: options.Method = "nf4",
    block_size: options.BlockSize = 64,
    double_quant: options.DoubleQuant = True,
    num_tokens: options.NumTokens = 1024,
    window_tokens: options.WindowTokens = None,
    seed: Seed = 42,
    stability: options.Stability = False,
    budget: options.Budget = None,
    max_kl: options.MaxKl = None,
    progressive: options.Progressive = False,
    steps: options.Steps = 4,
    statistics: options.Statistics = False,
    top: options.Top = 20,
    out: options.Out = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Quantize one layer at a time, rank them, and choose which ones keep more bits."""
    _require_agreeing(given_options(context), method)
    budget_bytes = None if budget is None else parse_bytes(budget)

    from qlora_kit.cli.console import console_reporter
    from qlora_kit.quantize.rounding import Rounding

    rounding = Rounding(method, block_size, double_quant)
    spec = model_spec(model, trust_remote_code, allow_pickle)
    reporter = console_reporter(to_stderr=as_json)
    if statistics:
        _weights_alone(spec, rounding, top, out, as_json, reporter)

    from qlora_kit.quantize.sensitivity.run import Request, run_sensitivity

    assert data is not None
    request = Request(
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
    )
    found, chosen = run_sensitivity(spec, request, reporter)
    values = _values(model, found, chosen)
    if out is not None:
        _write(out, values, found, chosen)
    if as_json:
        print(json_text(values))
    else:
        _show(reporter, found, chosen, top)
        if out is not None:
            reporter.say(f"Everything is in {out}.")


def _require_agreeing(given: frozenset[str], method: str) -> None:
    """One way of choosing a mixture, or none, and no option that would do nothing."""
    if "statistics" in given:
        refuse_unused(given, _OF_RUNNING, "with --statistics, which runs nothing")
    elif "data" not in given:
        raise typer.BadParameter("name rows to measure on with --data, such as a text file.")
    if {"budget", "max_kl"} <= given:
        raise typer.BadParameter("--budget and --max-kl both choose a mixture; give one of them.")
    if "progressive" not in given:
        refuse_unused(given, ("steps",), "without --progressive")
    elif "max_kl" not in given:
        raise typer.BadParameter("--progressive stops at a budget of quality; give --max-kl.")
    if "check" in given and "cheap" not in given:
        raise typer.BadParameter("--check measures some of what --cheap estimates; add --cheap.")
    if method == "int8":
        refuse_unused(given, ("block_size",), "with int8, which has a scale for each row")
    if method in ("int4", "int8"):
        refuse_unused(given, ("double_quant",), f"with {method}, whose scales stay as they are")


def _weights_alone(
    spec: ModelSpec,
    rounding: Rounding,
    top: int,
    out: Path | None,
    as_json: bool,
    reporter: Reporter,
) -> NoReturn:
    """Statistics of the weights, and the end of the verb: exit code 1 where one is no number."""
    from dataclasses import asdict

    from qlora_kit.quantize.sensitivity.run import require_writable
    from qlora_kit.quantize.sensitivity.stored import stored_statistics
    from qlora_kit.report import sensitivity as report

    if out is not None:
        require_writable(out)
    layers = stored_statistics(spec, rounding, reporter)
    text = json_text([asdict(one) for one in layers])
    if out is not None:
        _write_statistics(out, text)
    if as_json:
        print(text)
    else:
        report.statistics(reporter, layers, top)
        if out is not None:
            reporter.say(f"Of every layer they are in {out / STATISTICS_FILE}.")
    raise typer.Exit(1 if any(one.num_non_finite for one in layers) else 0)


def _write_statistics(out: Path, text: str) -> None:
    from qlora_kit.atomic import published_folder

    with published_folder(out) as draft:
        (draft / STATISTICS_FILE).write_text(text + "\n", encoding="utf-8")


def _show(
    reporter: Reporter, found: Sensitivity, chosen: Chosen | Descent | None, top: int
) -> None:
    """The ranking, a few statistics, and the mixture with the section that loads it."""
    from qlora_kit.report import sensitivity as report

    report.ranking(reporter, found, top)
    report.statistics(reporter, found.statistics, min(top, 5))
    if chosen is not None:
        report.chosen(reporter, chosen)
        reporter.say("")
        reporter.say(_fragment(chosen))


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
        text = json_text(values)
        (draft / "sensitivity.json").write_text(text + "\n", encoding="utf-8")
        heat_map(found, draft / "heat-map.png")
        if chosen is not None:
            (draft / "recipe.yaml").write_text(_fragment(chosen), encoding="utf-8")
