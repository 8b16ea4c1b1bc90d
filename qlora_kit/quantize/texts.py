"""From what a user names to examples: a recipe, a file, a folder, a hub data set, the demo's rows.

Used for calibration text and for the held-out text that a result is compared on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_kit.data.examples import Conversation, Example, PlainText
from qlora_kit.data.prepare import selection_for
from qlora_kit.data.read import BadRow, read_source, require_readable
from qlora_kit.data.render import render
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.schemas import Recogniser, fine_tuning_example
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import DataError
from qlora_kit.recipe import SourceSpec, load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.mark import LossOn
    from qlora_kit.recipe import DataSpec

Part = Literal["train", "eval"]

DEMO_DATA = "demo/commands"


@dataclass(frozen=True)
class KnownSet:
    """A part of a hub data set under the name that papers on quantization know it by."""

    train: SourceSpec
    eval: SourceSpec
    joined_rows: int = 1
    """Rows that make up one text: WikiText keeps each paragraph, and each empty line, as a row."""


def _wikitext(split: str) -> SourceSpec:
    # The tokens of 8,000 rows are about half a million.
    return SourceSpec(
        path="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        split=split,
        type="text",
        max_rows=8_000,
    )


def _c4(split: str) -> SourceSpec:
    return SourceSpec(path="allenai/c4", config="en", split=split, type="text", max_rows=2_000)


KNOWN_SETS = {
    "wikitext2": KnownSet(_wikitext("train"), _wikitext("test"), joined_rows=200),
    "c4": KnownSet(_c4("train"), _c4("validation")),
}


@dataclass(frozen=True)
class Texts:
    """Sources of rows, and which of their tokens count as supervised."""

    sources: tuple[SourceSpec, ...]
    loss_on: LossOn
    description: str
    joined_rows: int = 1
    is_divided: bool = False
    """Whether some of its rows do not calibrate, because the comparison has no text of its own."""
    recipe_part: tuple[DataSpec, Part] | None = None
    """Where a recipe says which of the rows are used: not those that are held out, for instance."""


def find_texts(name: str, part: Part) -> Texts:
    """`name` is a recipe (.yaml), `wikitext2` or `c4`, or anything that a recipe's source may be.

    Of a recipe `part` says which sources; of a data set that is known to be divided, which split;
    a file has no parts.

    Raises:
        DataError: the recipe names no such source. RecipeError: it is at fault.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        data = load_recipe(name).data
        if part == "eval" and not data.has_eval_rows:
            raise DataError(f"{name} names no source in data.eval; add one, or name a file.")
        sources = data.eval if part == "eval" and data.eval else data.train
        return Texts(
            sources, data.loss_on, f"data.{part} of {_published(name)}", recipe_part=(data, part)
        )
    if name.lower() in KNOWN_SETS:
        known = KNOWN_SETS[name.lower()]
        spec = known.train if part == "train" else known.eval
        description = f"{name.lower()} ({spec.split})"
        return Texts((spec,), "all", description, known.joined_rows)
    if name == DEMO_DATA:
        split = "train" if part == "train" else "test"
        return Texts((SourceSpec(path=name, split=split),), "assistant", f"{name} ({split})")
    return Texts((SourceSpec(path=name),), "assistant", _published(name))


def _published(name: str) -> str:
    """Of what is on this machine the last part alone: a description goes into cards as well."""
    path = Path(name)
    return path.name if path.is_absolute() or path.exists() else name


def require_rows(name: str, part: Part) -> None:
    """
    Raises:
        DataError: a source is not there or cannot be read. RecipeError: the recipe is at fault.
    """
    require_readable(find_texts(name, part).sources)


@dataclass(frozen=True)
class Rendered:
    """Rows as sequences, whole, in order, by source."""

    rows: list[list[TokenSequence]]
    description: str
    """Of the texts, and how many of their rows cannot be used."""


class _LeftOut:
    """Counts rows that cannot be used."""

    num_rows = 0


def render_texts(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The rows of each source; those that cannot be used are left out, and counted.

    Raises:
        DataError: a source cannot be read, or has no row that can be used.
    """
    left_out = _LeftOut()
    found = [list(_rendered(source, texts, tokenizer, left_out)) for source in texts.sources]
    if not any(found):
        raise DataError(
            f"{texts.description} has no row that can be used; `qlora-kit data` shows why."
        )
    is_told = left_out.num_rows > 0 and texts.joined_rows == 1  # WikiText has empty rows by nature
    note = f", {left_out.num_rows:,} of whose rows cannot be used" if is_told else ""
    return Rendered(found, texts.description + note)


def _rendered(
    source: SourceSpec, texts: Texts, tokenizer: PreTrainedTokenizerBase, left_out: _LeftOut
) -> Iterator[TokenSequence]:
    examples = _examples(source, texts.recipe_part, left_out)
    for example in _joined(examples, texts.joined_rows):
        try:
            sequence = render(_without_template(example, tokenizer), tokenizer, texts.loss_on)
        except RowRefused:
            left_out.num_rows += 1
            continue
        if sequence.num_tokens > 1:
            yield sequence
        else:
            left_out.num_rows += 1


def _examples(
    source: SourceSpec, recipe_part: tuple[DataSpec, Part] | None, left_out: _LeftOut
) -> Iterator[Example]:
    """The sound rows; those of the hub are read as far as they are needed, and not stored."""
    recogniser = Recogniser(source, needs_answer=False)
    selection = None if recipe_part is None else selection_for(recipe_part[1], recipe_part[0])
    for row in read_source(source, streaming=True):
        answer = example = None
        if not isinstance(row, BadRow):
            with suppress(RowRefused):
                example = recogniser.recognise(row)
                answer = fine_tuning_example(example)
        if example is None or answer is None:
            left_out.num_rows += 1
        elif selection is None or selection.rule_against(example) is None:
            yield answer


def _joined(examples: Iterator[Example], num_rows: int) -> Iterator[Example]:
    """Plain texts put together, `num_rows` at a time, with an empty line between them."""
    if num_rows == 1:
        yield from examples
        return
    while some := [one for one in islice(examples, num_rows) if isinstance(one, PlainText)]:
        yield PlainText("\n\n".join(one.text for one in some), some[0].origin)


def _without_template(example: Example, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A conversation as plain text where the tokenizer has no chat template."""
    if not isinstance(example, Conversation) or tokenizer.chat_template is not None:
        return example
    text = "\n".join(message.content for message in example.messages)
    return PlainText(text, example.origin)
