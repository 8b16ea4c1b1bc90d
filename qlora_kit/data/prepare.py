"""The builder of this package: sources and a tokenizer in, sequences and ledgers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.data.ledger import Ledger
from qlora_kit.data.read import read_rows
from qlora_kit.data.render import (
    IGNORE_INDEX,
    LossOn,
    TokenSequence,
    end_of_turn_id,
    render,
)
from qlora_kit.data.schema import Conversation, Example, PlainText, to_example
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.recipe import DataSpec, SourceSpec


@dataclass(frozen=True)
class Part:
    """One part of the data, train or eval: its examples, what became of them, and the count."""

    examples: tuple[Example, ...]
    sequences: tuple[TokenSequence, ...]
    ledger: Ledger

    @classmethod
    def empty(cls) -> Part:
        """The part of a recipe that names no source for it."""
        return cls((), (), Ledger())

    @property
    def num_supervised(self) -> int:
        return sum(sequence.num_supervised for sequence in self.sequences)


def read_examples(sources: Sequence[SourceSpec]) -> tuple[Example, ...]:
    """Every example of every source, in order."""
    return tuple(
        to_example(row)
        for source in sources
        for row in read_rows(source.path, source.split, source.max_rows)
    )


def prepare_part(
    name: str,
    sources: Sequence[SourceSpec],
    tokenizer: PreTrainedTokenizerBase,
    spec: DataSpec,
    stop_ids: frozenset[int],
) -> Part:
    """Read, render and fit one part to max_length.

    `stop_ids` are the tokens at which generation stops; the end-of-turn token that is
    trained must be one of them.

    Raises:
        DataError: nothing is left to train on, too much would be lost, or the model would
            never learn to stop.
    """
    examples = read_examples(sources)
    if any(isinstance(example, Conversation) for example in examples):
        prove_end_of_turn(tokenizer, stop_ids)
    ledger = Ledger()
    sequences: list[TokenSequence] = []
    for example in examples:
        sequence = render(example, tokenizer, spec.loss_on)
        sequences += _fit(example, sequence, spec, ledger)
    ledger.num_sequences = len(sequences)
    ledger.check_balance()
    _refuse_losses(name, ledger, spec)
    return Part(examples, tuple(sequences), ledger)


def prove_end_of_turn(
    tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]
) -> int:
    """Show that the token that ends an assistant turn is supervised and stops generation.

    Raises:
        DataError: it is not.
    """
    end = end_of_turn_id(tokenizer)
    if end not in stop_ids:
        tokens = tokenizer.convert_ids_to_tokens([end, *sorted(stop_ids)])
        raise DataError(
            f"the chat template ends a turn with {tokens[0]}, but generation stops only at "
            f"{', '.join(tokens[1:]) or 'nothing'}: the tuned model would not stop. Use the "
            "template that belongs to the model, or name it with model.chat_template."
        )
    return end


def _fit(
    example: Example, sequence: TokenSequence, spec: DataSpec, ledger: Ledger
) -> list[TokenSequence]:
    """Fit one sequence to max_length; books it whichever way that goes."""
    length = len(sequence.input_ids)
    ledger.num_rows += 1
    ledger.rendered_tokens += length
    if length <= spec.max_length:
        kept, cut = [sequence], 0
    elif isinstance(example, PlainText):
        kept, cut = _split(sequence, spec.max_length), 0
        ledger.split += 1
    elif spec.overlength == "truncate":
        kept, cut = [_truncate(sequence, spec.max_length)], length - spec.max_length
    else:
        return _drop("overlength", sequence, ledger)
    if not any(one.num_supervised for one in kept):
        return _drop("nothing supervised", sequence, ledger)
    if cut:
        ledger.truncated += 1
        ledger.note("truncated", sequence.origin)
    ledger.num_kept += 1
    ledger.cut_tokens += cut
    for one in kept:
        supervised = sum(label != IGNORE_INDEX for label in one.labels)
        ledger.supervised_tokens += supervised
        ledger.context_tokens += len(one.labels) - supervised
    return kept


def _drop(reason: str, sequence: TokenSequence, ledger: Ledger) -> list[TokenSequence]:
    ledger.dropped[reason] += 1
    ledger.dropped_tokens += len(sequence.input_ids)
    ledger.note(reason, sequence.origin)
    return []


def _truncate(sequence: TokenSequence, max_length: int) -> TokenSequence:
    """Cut the end off; the last supervised token, which ends the turn, goes with it."""
    return TokenSequence(
        sequence.input_ids[:max_length], sequence.labels[:max_length], sequence.origin
    )


def _split(sequence: TokenSequence, max_length: int) -> list[TokenSequence]:
    return [
        TokenSequence(
            sequence.input_ids[start : start + max_length],
            sequence.labels[start : start + max_length],
            sequence.origin,
        )
        for start in range(0, len(sequence.input_ids), max_length)
    ]


def _refuse_losses(name: str, ledger: Ledger, spec: DataSpec) -> None:
    shown = "; ".join(
        f"{reason}: {', '.join(origins)}" for reason, origins in ledger.examples.items()
    )
    if ledger.num_kept == 0:
        raise DataError(
            f"data.{name} has nothing to supervise: every row was dropped ({shown})."
        )
    share = ledger.num_lost / ledger.num_rows
    limit = 0.0 if spec.overlength == "error" else spec.max_dropped_share
    if share > limit:
        raise DataError(
            f"data.{name}: {ledger.num_lost} of {ledger.num_rows} rows ({share:.1%}) would be "
            f"dropped or truncated, more than the {limit:.1%} allowed ({shown}). Raise "
            f"data.max_length (now {spec.max_length}) or data.max_dropped_share."
        )
