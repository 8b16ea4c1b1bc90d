"""The builder of this package: sources and a tokenizer in, sequences and ledgers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.data.ledger import END_CUT, TRUNCATED, Ledger
from qlora_kit.data.read import read_rows
from qlora_kit.data.render import (
    IGNORE_INDEX,
    LossOn,
    TokenSequence,
    end_of_turn_id,
    render,
)
from qlora_kit.data.schema import Conversation, Example, PlainText, to_examples
from qlora_kit.data.template import PROBE, PROBE_ORIGIN, RowRefused
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.recipe import DataSpec, SourceSpec

OVERLENGTH = "longer than max_length"
NOTHING_SUPERVISED = "nothing supervised"
NOTHING_LEFT = "nothing supervised before max_length"


@dataclass(frozen=True)
class Part:
    """One part of the data, train or eval.

    `examples` are all that could be rendered, also those that were then dropped or cut for their
    length; `sequences` is what came of them, `ledger` the count.
    """

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
        example
        for source in sources
        for example in to_examples(read_rows(source.path, source.split, source.max_rows))
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
        prove_end_of_turn(tokenizer, stop_ids, spec.loss_on)
    ledger = Ledger()
    rendered: list[Example] = []
    sequences: list[TokenSequence] = []
    for example in examples:
        ledger.num_rows += 1
        try:
            sequence = render(example, tokenizer, spec.loss_on)
        except RowRefused as refused:
            ledger.drop(refused.reason, example.origin)
            continue
        rendered.append(example)
        sequences += _fit(example, sequence, spec, ledger)
    ledger.num_sequences = len(sequences)
    ledger.check_balance()
    _refuse_losses(name, ledger, spec)
    return Part(tuple(rendered), tuple(sequences), ledger)


def prove_end_of_turn(
    tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], loss_on: LossOn = "assistant"
) -> int:
    """Show that the token that ends an assistant turn is supervised and stops generation.

    Raises:
        DataError: it is not.
    """
    end = end_of_turn_id(tokenizer)
    probe = render(Conversation(PROBE, PROBE_ORIGIN), tokenizer, loss_on)
    if end not in probe.labels:
        raise DataError(f"{PROBE_ORIGIN}: the token that ends a turn would not be trained on.")
    if end not in stop_ids:
        tokens = tokenizer.convert_ids_to_tokens([end, *sorted(stop_ids)])
        stops = [token or "a token it does not have" for token in tokens[1:]]
        raise DataError(
            f"the chat template ends a turn with {tokens[0]}, but generation stops only at "
            f"{', '.join(stops) or 'nothing'}: the tuned model would not stop. Use the "
            "template that belongs to the model, or name it with model.chat_template."
        )
    return end


def _fit(
    example: Example, sequence: TokenSequence, spec: DataSpec, ledger: Ledger
) -> list[TokenSequence]:
    """Fit one sequence to max_length; books it whichever way that goes."""
    length, origin = len(sequence.input_ids), sequence.origin
    ledger.rendered_tokens += length
    if not sequence.num_supervised:
        ledger.drop(NOTHING_SUPERVISED, origin, length)
        return []
    if length <= spec.max_length:
        kept = [sequence]
    elif isinstance(example, PlainText):
        kept = _split(sequence, spec.max_length)
        ledger.split += 1
        ledger.repeated_tokens += len(kept) - 1
    elif spec.overlength == "truncate":
        kept = [_truncate(sequence, spec.max_length)]
        if not kept[0].num_supervised:
            ledger.drop(NOTHING_LEFT, origin, length)
            return []
        ledger.truncated += 1
        ledger.cut_tokens += length - spec.max_length
        ledger.example(TRUNCATED, origin)
        if _cuts_an_answer(sequence, spec.max_length):
            ledger.ends_cut += 1
            ledger.example(END_CUT, origin)
    else:
        ledger.drop(OVERLENGTH, origin, length)
        return []
    ledger.num_kept += 1
    for note in sequence.notes:
        ledger.note(note, origin)
    for one in kept:
        ledger.supervised_tokens += one.num_supervised
        ledger.context_tokens += len(one.labels) - one.num_supervised
    return kept


def _truncate(sequence: TokenSequence, max_length: int) -> TokenSequence:
    return TokenSequence(
        sequence.input_ids[:max_length],
        sequence.labels[:max_length],
        sequence.origin,
        sequence.notes,
    )


def _cuts_an_answer(sequence: TokenSequence, max_length: int) -> bool:
    """Whether what is supervised goes on behind the cut."""
    return IGNORE_INDEX not in sequence.labels[max_length - 1 : max_length + 1]


def _split(sequence: TokenSequence, max_length: int) -> list[TokenSequence]:
    """Pieces that each begin with the last token of the one before, as context.

    So every token but the very first is predicted once, and no piece is without supervision.
    """
    pieces = []
    for start in range(0, len(sequence.input_ids) - 1, max_length - 1):
        end = start + max_length
        labels = (IGNORE_INDEX, *sequence.labels[start + 1 : end])
        pieces.append(TokenSequence(sequence.input_ids[start:end], labels, sequence.origin))
    return pieces


def _refuse_losses(name: str, ledger: Ledger, spec: DataSpec) -> None:
    shown = "".join(f"\n  - {finding}" for finding in ledger.findings())
    if ledger.num_kept == 0:
        raise DataError(f"data.{name} has nothing to train on: every row was dropped.{shown}")
    num_overlength = ledger.dropped[OVERLENGTH]
    if spec.overlength == "error" and num_overlength:
        origins = ", ".join(ledger.examples[OVERLENGTH])
        raise DataError(
            f"data.{name}: {num_overlength} of {ledger.num_rows} rows are longer than "
            f"data.max_length, {spec.max_length} tokens (for example {origins}), and "
            "data.overlength is error. Raise the one, or set the other to drop or truncate."
        )
    share = ledger.num_lost / ledger.num_rows
    if share > spec.max_dropped_share:
        by_length = num_overlength + ledger.dropped[NOTHING_LEFT] + ledger.truncated
        longer = f"data.max_length (now {spec.max_length}) or " if by_length else ""
        raise DataError(
            f"data.{name}: {ledger.num_lost} of {ledger.num_rows} rows ({share:.1%}) would be "
            f"dropped or truncated, more than the {spec.max_dropped_share:.1%} allowed. Mend "
            f"them, or raise {longer}data.max_dropped_share.{shown}"
        )
