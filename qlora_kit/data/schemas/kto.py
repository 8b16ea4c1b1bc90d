"""`kto`: an answer, and whether it is wanted.

    {"prompt": "Q: 1 + 1\\nA:", "completion": " 2", "label": true}
    {"messages": […], "label": false}
    {"instruction": "Translate: dog", "output": "Hund", "kto_tag": true}

Rules:
- Beside `label` or `kto_tag` the row is one of `messages`, `sharegpt`, `alpaca` or
  `prompt_completion`; of a conversation, what follows the last user turn is rated.
- The rating is true or false, 1 or 0 (1.0 and 0.0, too), or the text of any of these, which is
  all that a table can hold. With any other label (`good`, 4, 0.5) the row is no `kto`, and the
  label is a column that is not read, and is listed as such; but in a source that is `kto`, such
  a label is a fault.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from qlora_kit.data.examples import Conversation, PlainText, Preference, Rated
from qlora_kit.data.rows import Record
from qlora_kit.data.schemas import alpaca, completion, messages, sharegpt
from qlora_kit.data.schemas.fields import Unfit, kind, one_of, shown
from qlora_kit.data.schemas.schema import Rules, Schema, refuse_unread
from qlora_kit.data.schemas.turns import last_answer

KEYS = ("label", "kto_tag")
BASES = (messages.SCHEMA, sharegpt.SCHEMA, alpaca.SCHEMA, completion.SCHEMA)
_WORDS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def read(record: Record, origin: str, rules: Rules) -> Rated:
    """One row of this schema."""
    base = _base(record, record, rules.mapped)
    if base is None:
        raise Unfit("nothing is rated", "label stands beside neither messages nor a completion")
    refuse_unread(record, base.unread(record))
    key = one_of(record, KEYS, rules.mapped, "the rating")
    wanted = _rating(record[key], key)
    answer = base.read(record, origin, replace(rules, needs_answer=True))
    assert not isinstance(answer, PlainText | Preference | Rated)
    if isinstance(answer, Conversation):
        num_given = max(answer.num_given, last_answer(answer.messages))
        answer = replace(answer, num_given=num_given)
    return Rated(answer, wanted, origin)


def _base(
    record: Record, present: Collection[str], mapped: frozenset[str] = frozenset()
) -> Schema | None:
    """What is rated: of the schemas that read every mapped field, the first that fits."""
    bases = [one for one in BASES if one.reads.issuperset(mapped.difference(KEYS))]
    filled = [key for key in present if record[key] is not None]
    fitting = [one for keys in (filled, present) for one in bases if one.fits(record, keys)]
    return fitting[0] if fitting else None


def _fits(record: Record, present: Collection[str]) -> bool:
    rated = any(_is_rating(record[key]) for key in KEYS if key in present)
    return rated and _base(record, present) is not None


def _is_rating(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() in _WORDS
    return value is None or (isinstance(value, bool | int | float) and value in (0, 1))


def _rating(value: Any, key: str) -> bool:
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    if not isinstance(value, int | float) or value not in (0, 1):
        raise Unfit(
            f"label is {kind(value)}", f"{key} is {shown(value)}, not true or false, 1 or 0"
        )
    return bool(value)


SCHEMA = Schema(
    name="kto",
    layout="an answer and whether it is wanted",
    slots=(KEYS,),
    reads=frozenset({*KEYS, *(key for base in BASES for key in base.reads)}),
    read=read,
    also_fits=_fits,
)
