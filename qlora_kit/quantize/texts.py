"""From what a user names to examples: a recipe, a file, a folder, a hub data set, the demo's rows.

Used for calibration text and for the held-out text that a result is compared on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_kit.data.examples import Conversation, Example, PlainText
from qlora_kit.data.prepare import read_examples
from qlora_kit.data.render import render
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.schemas import fine_tuning_example
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import DataError
from qlora_kit.recipe import SourceSpec, load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.mark import LossOn

Part = Literal["train", "eval"]

# Names that stand for a part of a hub data set, as papers on quantization use them.
KNOWN_SETS: dict[str, dict[Part, SourceSpec]] = {
    "wikitext2": {
        "train": SourceSpec(path="Salesforce/wikitext", config="wikitext-2-raw-v1", type="text"),
        "eval": SourceSpec(
            path="Salesforce/wikitext", config="wikitext-2-raw-v1", split="test", type="text"
        ),
    },
    "c4": {
        "train": SourceSpec(path="allenai/c4", config="en", type="text"),
        "eval": SourceSpec(path="allenai/c4", config="en", split="validation", type="text"),
    },
}
DEMO_DATA = "demo/commands"
_STREAMED_ROWS = 20_000


@dataclass(frozen=True)
class Texts:
    """Sources of rows, and which of their tokens count as supervised."""

    sources: tuple[SourceSpec, ...]
    loss_on: LossOn
    description: str


def find_texts(name: str, part: Part) -> Texts:
    """`name` is a recipe (.yaml), `wikitext2` or `c4`, or anything that a recipe's source may be.

    Of a recipe `part` says which sources; of a data set that is known to be divided, which split;
    a file has no parts.

    Raises:
        DataError: the recipe names no such source. RecipeError: it is at fault.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        recipe = load_recipe(name)
        sources = recipe.data.train if part == "train" else recipe.data.eval
        if not sources:
            raise DataError(f"{name} names no source in data.eval; add one, or name a file.")
        return Texts(sources, recipe.data.loss_on, f"data.{part} of {name}")
    if name.lower() in KNOWN_SETS:
        spec = KNOWN_SETS[name.lower()][part]
        return Texts((spec,), "all", f"{name.lower()} ({spec.split})")
    if name == DEMO_DATA:
        split = "train" if part == "train" else "test"
        return Texts((SourceSpec(path=name, split=split),), "assistant", f"{name} ({split})")
    return Texts((SourceSpec(path=name),), "assistant", name)


def render_texts(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> list[list[TokenSequence]]:
    """The rows of each source as sequences, whole, in order; rows that cannot be used are left out.

    Raises:
        DataError: a source cannot be read, or has no row that can be used.
    """
    found = [list(_rendered(source, texts, tokenizer)) for source in texts.sources]
    if not any(found):
        raise DataError(
            f"{texts.description} has no row that can be used; `qlora-kit data` shows why."
        )
    return found


def _rendered(
    source: SourceSpec, texts: Texts, tokenizer: PreTrainedTokenizerBase
) -> Iterator[TokenSequence]:
    for example in _examples((source,)):
        if isinstance(example, PlainText) and not example.text.strip():
            continue
        plain = _without_template(example, tokenizer)
        try:
            sequence = render(plain, tokenizer, texts.loss_on)
        except RowRefused:
            continue
        if sequence.num_tokens > 1:
            yield sequence


def _examples(sources: Sequence[SourceSpec]) -> Iterator[Example]:
    for example in read_examples(sources, needs_answer=False):
        answer = fine_tuning_example(example)
        if answer is not None:
            yield answer


def _without_template(example: Example, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A conversation as plain text where the tokenizer has no chat template."""
    if not isinstance(example, Conversation) or tokenizer.chat_template is not None:
        return example
    text = "\n".join(message.content for message in example.messages)
    return PlainText(text, example.origin)
