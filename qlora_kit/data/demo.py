"""`demo/commands`: spoken home and calendar commands to strict one-line JSON.

    turn the lamp in the office down to thirty percent
    {"action":"set","device":"lamp","room":"study","value":30}

The task needs no download, and every answer can be verified. How it is built:

1. An action is a list of slots; a slot maps each canonical value to the ways people say it
   ("7:30 pm" to "half past seven in the evening" or "7 30 pm"). The text is lower case and
   without punctuation, as a speech recogniser writes it.
2. A combination is one canonical value for each slot of an action. The answer is that
   combination as JSON and nothing else, so it can be read back into the slots.
3. For every action the pairs of two named slots are split: one pair in five belongs to
   `test`, the others to `train`. So a test row is not only a new combination: its device was
   never seen in its room, its errand never on its day. Each single value does occur in
   training: the task is to put known parts together, not to guess unknown ones. No test
   answer is a training answer, so a model that looks up what it has seen scores 0.
4. Rows are spread evenly over the actions, and nearly evenly over the values of each slot;
   all texts are distinct, and so are all combinations within `test`.

Only `Random.random()` is used: Python promises its sequence from version to version.
"""

from __future__ import annotations

import json
from collections import Counter
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

SYSTEM_MESSAGE = "Answer in JSON."
"""Short, and given: SmolLM2's template would otherwise insert its own, twelve tokens longer."""

NUM_ROWS = {"train": 576, "test": 96}
NUM_DRAWN = 8
"""Combinations drawn for each row; the one that holds the rarest value so far is kept."""

TEST_SHARE = 0.2
"""Share of the split pairs that belong to `test`."""

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEEN_STEMS = ["thir", "four", "fif", "six", "seven", "eigh", "nine"]
TEENS = ["ten", "eleven", "twelve", *(f"{stem}teen" for stem in TEEN_STEMS)]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spell(number: int) -> str:
    """An integer from 0 to 99 in English words."""
    if number < 20:
        return (ONES + TEENS)[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f" {ONES[ones]}" if ones else "")


def say_time(hour: int, minute: int, half_of_day: str) -> tuple[str, ...]:
    """The ways to say a time of the twelve-hour clock, at the hour or half past it."""
    words = f"half past {spell(hour)}" if minute else f"{spell(hour)} o'clock"
    part_of_day = "morning" if half_of_day == "am" else "afternoon" if hour < 6 else "evening"
    digits = f"{hour} {minute}" if minute else f"{hour}"
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
PERCENT: Phrases = {n: (f"{n} percent", f"{spell(n)} percent") for n in range(5, 100, 5)}
STATES: Phrases = {"on": ("on",), "off": ("off",)}
DEGREES: Phrases = {n: (f"{n} degrees", f"{spell(n)} degrees") for n in range(15, 27)}
MINUTES: Phrases = {
    **{n: (f"{n} minutes", f"{spell(n)} minutes") for n in (5, 8, 10, 12, 20, 25, 40, 45, 50)},
    15: ("15 minutes", "a quarter of an hour"),
    30: ("30 minutes", "half an hour"),
}
CHORES: Phrases = {
    "pasta": ("pasta",),
    "eggs": ("eggs",),
    "tea": ("tea",),
    "laundry": ("laundry",),
    "pizza": ("pizza",),
    "bread": ("bread",),
    "rice": ("rice",),
    "homework": ("homework",),
    "workout": ("workout",),
    "nap": ("nap",),
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
    f"{hour}:{minute:02} {half_of_day}": say_time(hour, minute, half_of_day)
    for half_of_day, hours in (("am", range(6, 12)), ("pm", range(1, 11)))
    for hour in hours
    for minute in (0, 30)
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
        return json.dumps({"action": self.action, **dict(self.slots)}, separators=(",", ":"))


def demo_rows(name: str, split: str) -> list[dict[str, list[dict[str, str]]]]:
    """One split of a built-in data set as conversations; the same rows at every call.

    Raises:
        DataError: there is no such data set or split.
    """
    if name != "commands":
        raise DataError(f"there is no built-in data set demo/{name}; known: demo/commands.")
    if split not in NUM_ROWS:
        known = ", ".join(NUM_ROWS)
        raise DataError(f"demo/{name} has no split {split!r}; known: {known}.")
    return [
        {
            "messages": [
                {"role": "system", "content": SYSTEM_MESSAGE},
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
    seen: set[str] = set()
    used: Counter[tuple[int, tuple[str, Value]]] = Counter()
    examples: list[Example] = []
    while len(examples) < NUM_ROWS[split]:
        turn = len(examples) % len(ACTIONS)
        drawn = [_pick(pools[turn], rng) for _ in range(NUM_DRAWN)]
        slots = min(drawn, key=lambda slots: min(used[turn, item] for item in slots.items()))
        example = _phrase(ACTIONS[turn], slots, rng)
        identity = example.answer if split == "test" else example.text
        if identity not in seen:
            seen.add(identity)
            examples.append(example)
            used.update((turn, item) for item in slots.items())
    return _shuffled(examples, rng)


def combinations(action: Action, split: str) -> list[dict[str, Value]]:
    """Every combination of the action's slots that belongs to the split."""
    first, second = action.split_by
    pairs = list(product(action.slots[first], action.slots[second]))
    pairs = _shuffled(pairs, Random(f"demo/commands/{action.name}"))
    test_pairs = set(pairs[: round(TEST_SHARE * len(pairs))])
    everything = (
        dict(zip(action.slots, values, strict=True)) for values in product(*action.slots.values())
    )
    return [
        slots
        for slots in everything
        if ((slots[first], slots[second]) in test_pairs) == (split == "test")
    ]


def _phrase(action: Action, slots: Mapping[str, Value], rng: Random) -> Example:
    spoken = {slot: _pick(action.slots[slot][value], rng) for slot, value in slots.items()}
    text = _pick(action.templates, rng).format_map(spoken) + _pick(ENDINGS, rng)
    return Example(action.name, tuple(slots.items()), text)


def _pick(options: Sequence[T], rng: Random) -> T:
    return options[int(rng.random() * len(options))]


def _shuffled(items: Iterable[T], rng: Random) -> list[T]:
    return sorted(items, key=lambda _: rng.random())
