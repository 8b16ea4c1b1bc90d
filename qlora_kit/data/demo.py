"""`demo/commands`: spoken home and calendar commands to strict one-line JSON.

    turn the lamp in the office down to thirty percent
    {"action":"set","device":"lamp","room":"study","value":30}

The task needs no download, and every answer can be verified. How it is built:

1. An action is a list of slots; a slot maps each canonical value to the ways people say it
   ("19:45" to "quarter to eight in the evening" or "7 45 pm"). The text is lower case and
   without punctuation, as a speech recogniser writes it.
2. A combination is one canonical value for each slot of an action. The answer is that
   combination as JSON and nothing else, so it can be read back into the slots.
3. For every action the pairs of two named slots are split: one pair in five belongs to
   `test`, the others to `train`. So a test row is not only a new combination: its device was
   never seen in its room, its errand never on its day. Each single value does occur in
   training: the task is to put known parts together, not to guess unknown ones. No test
   answer is a training answer, so a model that looks up what it has seen scores 0.
4. Rows are drawn evenly over the actions; all texts are distinct, and so are all
   combinations within `test`.

Only `Random.random()` is used: Python promises its sequence from version to version.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import TypeVar

from qlora_kit.errors import DataError

T = TypeVar("T")
Value = str | int
Phrases = Mapping[Value, tuple[str, ...]]
"""The ways to say each canonical value of one slot."""

NUM_ROWS = {"train": 1800, "test": 96}
TEST_SHARE = 0.2
"""Share of the split pairs that belong to `test`."""

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
TEENS = [
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spell(number: int) -> str:
    """An integer from 0 to 99 in English words."""
    small = ONES + TEENS
    if number < len(small):
        return small[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f" {ONES[ones]}" if ones else "")


def say_time(hour: int, minute: int) -> tuple[str, ...]:
    """The ways to say a time of day on a quarter hour, by the twelve-hour clock."""
    half_of_day = "am" if hour < 12 else "pm"
    part_of_day = "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"
    this_hour, next_hour = ONES[(hour - 1) % 12 + 1], ONES[hour % 12 + 1]
    words = {
        0: f"{this_hour} o'clock",
        15: f"quarter past {this_hour}",
        30: f"half past {this_hour}",
        45: f"quarter to {next_hour}",
    }[minute]
    digits = f"{(hour - 1) % 12 + 1}" + (f" {minute}" if minute else "")
    return f"{words} in the {part_of_day}", f"{digits} {half_of_day}"


ROOMS: Phrases = {
    "kitchen": ("kitchen",),
    "bedroom": ("bedroom", "master bedroom"),
    "living room": ("living room", "lounge", "sitting room"),
    "bathroom": ("bathroom", "washroom"),
    "hall": ("hall", "hallway", "corridor"),
    "study": ("study", "office", "home office"),
    "nursery": ("nursery", "baby's room"),
    "garage": ("garage", "carport"),
}
DIMMABLE: Phrases = {
    "lamp": ("lamp", "light"),
    "fan": ("fan", "ventilator"),
    "blinds": ("blinds", "shutters"),
    "speaker": ("speaker", "loudspeaker"),
    "screen": ("screen", "display"),
}
SWITCHABLE: Phrases = {
    "lamp": ("lamp", "light"),
    "fan": ("fan", "ventilator"),
    "tv": ("tv", "television", "telly"),
    "heater": ("heater", "radiator"),
    "camera": ("camera", "webcam"),
    "radio": ("radio",),
    "outlet": ("outlet", "socket"),
    "alarm": ("alarm", "siren"),
}
PERCENT: Phrases = {
    n: (f"{n} percent", f"{spell(n)} percent") for n in range(5, 100, 5)
}
STATES: Phrases = {"on": ("on",), "off": ("off",)}
DEGREES: Phrases = {n: (f"{n} degrees", f"{spell(n)} degrees") for n in range(15, 27)}
MINUTES: Phrases = {
    **{
        n: (f"{n} minutes", f"{spell(n)} minutes")
        for n in (5, 8, 10, 12, 20, 25, 40, 50)
    },
    15: ("15 minutes", "a quarter of an hour"),
    30: ("30 minutes", "half an hour"),
    45: ("45 minutes", "three quarters of an hour"),
    60: ("60 minutes", "an hour", "one hour"),
    90: ("90 minutes", "an hour and a half"),
    120: ("120 minutes", "two hours"),
}
CHORES: Phrases = {
    chore: (chore,)
    for chore in [
        "pasta",
        "eggs",
        "tea",
        "laundry",
        "pizza",
        "bread",
        "rice",
        "homework",
        "workout",
        "nap",
    ]
}
ERRANDS: Phrases = {
    "call mum": ("call mum", "ring my mother", "phone mum"),
    "pay rent": ("pay the rent",),
    "water plants": ("water the plants", "give the plants some water"),
    "buy milk": ("buy milk", "get some milk"),
    "walk dog": ("walk the dog", "take the dog out"),
    "take pills": ("take my pills", "take my medicine"),
    "feed cat": ("feed the cat",),
    "book flight": ("book a flight", "book the flight"),
}
DAYS: Phrases = {
    "mon": ("on monday",),
    "tue": ("on tuesday",),
    "wed": ("on wednesday",),
    "thu": ("on thursday",),
    "fri": ("on friday",),
    "sat": ("on saturday",),
    "sun": ("on sunday",),
    "today": ("today",),
    "tomorrow": ("tomorrow",),
}
TIMES: Phrases = {
    f"{hour:02}:{minute:02}": say_time(hour, minute)
    for hour in range(7, 22)
    for minute in (0, 15, 30, 45)
}
MUSIC: Phrases = {
    style: (style, f"some {style}", f"{style} music")
    for style in ["jazz", "rock", "soul", "blues", "techno", "folk", "metal", "reggae"]
}
VOLUMES: Phrases = {
    "low": ("quietly", "at low volume"),
    "medium": ("at normal volume", "at medium volume"),
    "high": ("loudly", "at full volume"),
}


@dataclass(frozen=True)
class Action:
    """One kind of command."""

    name: str
    slots: Mapping[str, Phrases]
    """In the order of the answer's keys."""
    split_by: tuple[str, str]
    """The two slots whose pairs are divided between train and test."""
    templates: tuple[str, ...]


ACTIONS = (
    Action(
        "set",
        {"device": DIMMABLE, "room": ROOMS, "value": PERCENT},
        ("device", "room"),
        (
            "set the {device} in the {room} to {value}",
            "turn the {room} {device} down to {value}",
            "turn the {device} in the {room} up to {value}",
            "i want the {room} {device} at {value}",
            "{room} {device} to {value}",
        ),
    ),
    Action(
        "switch",
        {"device": SWITCHABLE, "room": ROOMS, "state": STATES},
        ("device", "room"),
        (
            "turn {state} the {device} in the {room}",
            "switch the {room} {device} {state}",
            "turn the {device} {state} in the {room}",
            "the {room} {device} should be {state}",
            "{room} {device} {state}",
        ),
    ),
    Action(
        "heat",
        {"room": ROOMS, "degrees": DEGREES},
        ("room", "degrees"),
        (
            "set the heating in the {room} to {degrees}",
            "make it {degrees} in the {room}",
            "heat the {room} to {degrees}",
            "i would like {degrees} in the {room}",
            "keep the {room} at {degrees}",
        ),
    ),
    Action(
        "timer",
        {"minutes": MINUTES, "for": CHORES},
        ("minutes", "for"),
        (
            "set a timer for {minutes} for the {for}",
            "start a {for} timer for {minutes}",
            "time the {for} for {minutes}",
            "tell me when {minutes} are up for the {for}",
            "{for} timer {minutes}",
        ),
    ),
    Action(
        "remind",
        {"what": ERRANDS, "day": DAYS, "time": TIMES},
        ("what", "day"),
        (
            "remind me to {what} {day} at {time}",
            "{day} at {time} i have to {what}",
            "don't let me forget to {what} {day} at {time}",
            "i need to {what} at {time} {day}",
            "at {time} {day} remind me to {what}",
        ),
    ),
    Action(
        "play",
        {"music": MUSIC, "room": ROOMS, "volume": VOLUMES},
        ("music", "room"),
        (
            "play {music} in the {room} {volume}",
            "put {music} on in the {room} {volume}",
            "i want to hear {music} {volume} in the {room}",
            "{volume} play {music} in the {room}",
            "let's have {music} in the {room} {volume}",
        ),
    ),
)
ENDINGS = ("", "", "", " please", " now", " thanks")


@dataclass(frozen=True)
class Example:
    """One command, with the combination it asks for in canonical values."""

    action: str
    slots: tuple[tuple[str, Value], ...]
    text: str

    @property
    def answer(self) -> str:
        return json.dumps(
            {"action": self.action, **dict(self.slots)}, separators=(",", ":")
        )


def demo_rows(name: str, split: str) -> list[dict[str, list[dict[str, str]]]]:
    """One split of a built-in data set as conversations; the same rows at every call.

    Raises:
        DataError: there is no such data set or split.
    """
    if name != "commands":
        raise DataError(
            f"there is no built-in data set demo/{name}; known: demo/commands."
        )
    if split not in NUM_ROWS:
        known = ", ".join(NUM_ROWS)
        raise DataError(f"demo/{name} has no split {split!r}; known: {known}.")
    return [
        {
            "messages": [
                {"role": "user", "content": example.text},
                {"role": "assistant", "content": example.answer},
            ]
        }
        for example in command_examples(split)
    ]


def command_examples(split: str) -> list[Example]:
    """The examples behind the rows of `demo/commands`, in the same order."""
    rng = Random(f"demo/commands/{split}")
    pools = [combinations(action, split) for action in ACTIONS]
    seen: set[object] = set()
    examples: list[Example] = []
    while len(examples) < NUM_ROWS[split]:
        turn = len(examples) % len(ACTIONS)
        example = _phrase(ACTIONS[turn], _pick(pools[turn], rng), rng)
        identity = example.answer if split == "test" else example.text
        if identity not in seen:
            seen.add(identity)
            examples.append(example)
    return _shuffled(examples, rng)


def combinations(action: Action, split: str) -> list[dict[str, Value]]:
    """Every combination of the action's slots that belongs to the split."""
    first, second = action.split_by
    pairs = list(product(action.slots[first], action.slots[second]))
    pairs = _shuffled(pairs, Random(f"demo/commands/{action.name}"))
    test_pairs = set(pairs[: round(TEST_SHARE * len(pairs))])
    everything = (
        dict(zip(action.slots, values, strict=True))
        for values in product(*action.slots.values())
    )
    return [
        slots
        for slots in everything
        if ((slots[first], slots[second]) in test_pairs) == (split == "test")
    ]


def _phrase(action: Action, slots: Mapping[str, Value], rng: Random) -> Example:
    spoken = {
        slot: _pick(action.slots[slot][value], rng) for slot, value in slots.items()
    }
    text = _pick(action.templates, rng).format_map(spoken) + _pick(ENDINGS, rng)
    return Example(action.name, tuple(slots.items()), text)


def _pick(options: Sequence[T], rng: Random) -> T:
    return options[int(rng.random() * len(options))]


def _shuffled(items: Iterable[T], rng: Random) -> list[T]:
    return sorted(items, key=lambda _: rng.random())
