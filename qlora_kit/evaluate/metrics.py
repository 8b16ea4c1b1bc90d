"""What answers are worth, by comparison with their references: labels, ROUGE, BLEU, chrF."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qlora_kit.errors import DataError
from qlora_kit.evaluate.generation import Answer
from qlora_kit.recipe.evaluate import MetricName

# Beyond so many labels to a row nobody means labels.
_MAX_LABELS_PER_ROW = 0.5
_MIN_ROWS = 4


@dataclass(frozen=True)
class Labelled:
    """A classification set: what each row should have been called, and what it was called.

    `predicted` is None where the answer is no label of the set.
    """

    wanted: tuple[str, ...]
    predicted: tuple[str | None, ...]

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Labelled:
        """Labels are the reference answers, spaces around them and upper case apart."""
        wanted = tuple(_label(one.reference) for one in answers)
        labels = frozenset(wanted)
        said = [None if one.too_long else _label(one.text) for one in answers]
        return cls(wanted, tuple(label if label in labels else None for label in said))

    @property
    def num_labels(self) -> int:
        return len(set(self.wanted))

    @property
    def num_unlabelled(self) -> int:
        """Answers that are no label."""
        return self.predicted.count(None)

    @property
    def looks_like_text(self) -> bool:
        """Whether there are so many different references that they can hardly be labels."""
        num_rows = len(self.wanted)
        return num_rows >= _MIN_ROWS and self.num_labels > _MAX_LABELS_PER_ROW * num_rows

    @property
    def accuracy(self) -> float:
        pairs = zip(self.wanted, self.predicted, strict=True)
        return sum(one == other for one, other in pairs) / len(self.wanted)

    @property
    def macro_f1(self) -> float:
        """The mean over the labels of F1 = 2·TP / (2·TP + FP + FN), each label counting alike.

        An answer that is no label is a false negative of the one that was wanted, and a false
        positive of none.
        """
        wanted, predicted = Counter(self.wanted), Counter(self.predicted)
        pairs = zip(self.wanted, self.predicted, strict=True)
        right = Counter(one for one, other in pairs if one == other)
        return statistics.fmean(
            2 * right[label] / (wanted[label] + predicted[label]) for label in wanted
        )


def measure_metrics(
    answers: Sequence[Answer], names: Sequence[MetricName]
) -> tuple[dict[str, float], list[str]]:
    """The figures by name, and what a person should know of them.

    Shares and ROUGE lie between 0 and 1, BLEU and chrF between 0 and 100, as their libraries have
    it. A prompt that left no room for an answer counts as one that was answered with nothing.

    Raises:
        DataError: there are no answers.
    """
    if not answers:
        raise DataError("metrics cannot be measured: there is no prompt with a reference.")
    figures: dict[str, float] = {}
    findings: list[str] = []
    if "accuracy" in names or "macro_f1" in names:
        labelled = Labelled.of(answers)
        if "accuracy" in names:
            figures["accuracy"] = labelled.accuracy
        if "macro_f1" in names:
            figures["macro_f1"] = labelled.macro_f1
        figures["unlabelled"] = labelled.num_unlabelled / len(answers)
        if labelled.looks_like_text:
            findings.append(
                f"accuracy and macro-F1 are for labels, and the {len(answers)} references have "
                f"{labelled.num_labels} different texts; exact_match or rouge suit such data."
            )
    for name in names:
        if name in _LIBRARIES:
            figures.update(_LIBRARIES[name](answers))
    return figures, findings


def _label(text: str) -> str:
    return text.strip().casefold()


def _rouge(answers: Sequence[Answer]) -> Mapping[str, float]:
    """Mean F-measures, by Google's rouge-score with its stemmer."""
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    scores = [scorer.score(one.reference, one.text) for one in answers]
    return {kind: statistics.fmean(one[kind].fmeasure for one in scores) for kind in kinds}


def _bleu(answers: Sequence[Answer]) -> Mapping[str, float]:
    """Corpus BLEU with sacrebleu's own tokenizer (13a)."""
    import sacrebleu

    said, wanted = [one.text for one in answers], [one.reference for one in answers]
    return {"bleu": float(sacrebleu.corpus_bleu(said, [wanted]).score)}


def _chrf(answers: Sequence[Answer]) -> Mapping[str, float]:
    """Corpus chrF2."""
    import sacrebleu

    said, wanted = [one.text for one in answers], [one.reference for one in answers]
    return {"chrf": float(sacrebleu.corpus_chrf(said, [wanted]).score)}


_LIBRARIES: dict[str, Callable[[Sequence[Answer]], Mapping[str, float]]] = {
    "rouge": _rouge,
    "bleu": _bleu,
    "chrf": _chrf,
}
