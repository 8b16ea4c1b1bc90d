"""`qlora-kit data RECIPE`: what training will see, without loading the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.cli.arguments import AsJson, Overrides, RecipePath

if TYPE_CHECKING:
    from qlora_kit.data.prepare import Part
    from qlora_kit.model.vocabulary import Vocabulary
    from qlora_kit.recipe import Recipe
    from qlora_kit.recipe.data import PartName

NAME = "data"


def command(
    recipe: RecipePath,
    overrides: Overrides = None,
    examples: Annotated[
        int, typer.Option("--examples", min=0, help="How many rendered examples to show.")
    ] = 3,
    row: Annotated[
        str | None,
        typer.Option("--row", metavar="FILE:LINE", help="Show one row and what became of it."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the same as a web page.")
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="FILE", help="Write all rendered sequences as JSONL."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite the files of --html and --export.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what training will see: schemas, where every row and token went, lengths, examples."""
    place = _place(row)
    if row is not None and (html or export):
        raise typer.BadParameter("--row shows one row; --html and --export need all of them.")
    from qlora_kit.atomic import refuse_existing
    from qlora_kit.errors import RecipeError
    from qlora_kit.preflight import data_faults
    from qlora_kit.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    faults = data_faults(loaded)
    if faults:
        raise RecipeError(str(recipe), faults)
    for path in (html, export):
        if path is not None:
            refuse_existing(path, force)
    from qlora_kit.model.vocabulary import load_vocabulary

    vocabulary = load_vocabulary(loaded.model)
    if place is not None:
        _show_row(*place, loaded, vocabulary, as_json)
    else:
        _show_all(str(recipe), loaded, vocabulary, examples, html, export, force, as_json)


def _place(row: str | None) -> tuple[str, int] | None:
    if row is None:
        return None
    file, _, number = row.rpartition(":")
    if not file or not (number.isascii() and number.isdigit()):
        raise typer.BadParameter(f"--row is FILE:LINE, such as rows.jsonl:12, got '{row}'.")
    return file, int(number)


def _show_row(
    file: str, number: int, recipe: Recipe, vocabulary: Vocabulary, as_json: bool
) -> None:
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.data.trace import trace_row
    from qlora_kit.report import data_text

    fates = trace_row(file, number, recipe.data, vocabulary.tokenizer)
    if as_json:
        print(json.dumps([fate.as_dict() for fate in fates], indent=2, ensure_ascii=False))
        return
    reporter = console_reporter()
    for fate in fates:
        data_text.fate(reporter, fate)


def _show_all(
    title: str,
    recipe: Recipe,
    vocabulary: Vocabulary,
    num_examples: int,
    html: Path | None,
    export: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    from qlora_kit.atomic import publish_lines
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.data.losses import losses
    from qlora_kit.data.prepare import read_part
    from qlora_kit.data.preview import make_preview
    from qlora_kit.data.rendered_lines import rendered_lines
    from qlora_kit.errors import DataError
    from qlora_kit.report import data_page, data_text

    parts: dict[PartName, tuple[Part, str | None]] = {}
    names: tuple[PartName, ...] = ("train", "eval") if recipe.data.has_eval_rows else ("train",)
    for name in names:
        part = read_part(name, recipe.data, vocabulary.tokenizer, vocabulary.stop_ids)
        parts[name] = part, losses(name, part.ledger, recipe.data)
    found = make_preview(title, recipe, parts, vocabulary.tokenizer, num_examples)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    reporter = console_reporter(to_stderr=as_json)
    if not as_json:
        data_text.preview(reporter, found)
    if html is not None:
        publish_lines(html, [data_page.page(found)], force)
        reporter.say(f"\nThe page is {html}.")
    if export is not None:
        lines = (
            line
            for name, (part, _) in parts.items()
            for line in rendered_lines(name, part.sequences, vocabulary.tokenizer)
        )
        publish_lines(export, lines, force)
        num_lines = sum(len(part.sequences) for part, _ in parts.values())
        reporter.say(f"{num_lines:,} rendered sequences are in {export}.")
    if found.faults:
        raise DataError("\n".join(found.faults))
