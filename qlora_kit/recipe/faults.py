"""pydantic's errors in our words: what was expected, what was got, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qlora_kit.errors import Fault, RecipeError
from qlora_kit.recipe import shape
from qlora_kit.recipe.recipe import Recipe
from qlora_kit.recipe.yaml import parse_yaml

_EXAMPLES = {
    "model": "try model: {name_or_path: demo/smollm2-135m-instruct}",
    "model.name_or_path": "try name_or_path: demo/smollm2-135m-instruct",
    "data": "try data: {train: [{path: my_rows.jsonl}]}",
    "data.train": "try train: [{path: my_rows.jsonl}]",
}

# Keys of other tools, and ours for the same thing.
OTHER_NAMES = {
    "base_model": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "torch_dtype": "quantization.compute_dtype",
    "bnb_4bit_compute_dtype": "quantization.compute_dtype",
    "bnb_4bit_quant_type": "quantization.quant_type",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "bnb_4bit_quant_storage": "quantization.quant_storage",
    "llm_int8_threshold": "quantization.int8_threshold",
    "llm_int8_skip_modules": "quantization.skip_modules",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "init_lora_weights": "lora.init",
    "datasets": "data.train",
    "dataset": "data.train",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "optimizer": "train.optim",
    "lr_scheduler": "train.lr_scheduler_type",
    "warmup_ratio": "train.warmup_steps",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "group_by_length": "train.train_sampling_strategy",
    "evaluation_strategy": "train.eval_strategy",
    "val_set_size": "data.held_out",
    "output_dir": "run_dir",
}

# Of the values of other tools, ours for the same thing.
_OTHER_VALUES = {
    "train.optim": {"adamw": "adamw_torch", "adam": "adamw_torch", "adamw_hf": "adamw_torch"},
}

_MANY_CHOICES = 6

_BOUNDS = {
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
}


@dataclass(frozen=True)
class _Place:
    """Where in a recipe an error is; pydantic adds the branch of a union to the path."""

    path: tuple[str | int, ...]
    annotation: Any
    union_path: tuple[str | int, ...] | None

    @property
    def is_union_itself(self) -> bool:
        return self.path == self.union_path


def field_faults(error: ValidationError) -> Iterator[Fault]:
    """One fault for each thing wrong: no branch of a union on its own, and no echo of a fault."""
    found = [(_locate(details["loc"]), details) for details in error.errors(include_url=False)]
    paths = [place.path for place, _ in found]
    inside_unions = {place.union_path for place, _ in found if not place.is_union_itself}
    reported = set()
    for place, details in found:
        if place.is_union_itself and (place.path in inside_unions or place.path in reported):
            continue
        length = len(place.path)
        is_echo = any(len(path) > length and path[:length] == place.path for path in paths)
        if details["type"] == "too_short" and is_echo:
            continue  # pydantic does not count a faulty entry
        reported.add(place.path)
        yield _fault(place, details)


def show(value: Any, limit: int = 60) -> str:
    """A value as a recipe has it, cut to a readable length."""
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def show_kind(value: Any) -> str:
    """A value with what kind of thing it is: `text ('4')`."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return show(value)
    names: dict[type, str] = {dict: "a mapping", list: "a list", str: "text"}
    return f"{names.get(type(value), 'a number')} ({show(value)})"


def _locate(location: Sequence[str | int]) -> _Place:
    annotation: Any = Recipe
    path: list[str | int] = []
    union_path = None
    for part in location:
        branches = shape.members(annotation)
        if len(branches) > 1:
            union_path = tuple(path)
            label = str(part).removeprefix("constrained-").partition("[")[0]
            annotation = next(one for one in branches if shape.label(one) == label.lower())
            continue
        path.append(part)
        annotation = shape.child(annotation, part)
    return _Place(tuple(path), annotation, union_path)


def _fault(place: _Place, details: ErrorDetails) -> Fault:
    path = ".".join(str(part) for part in place.path)
    got, kind = details["input"], details["type"]
    if got is None and (blank := _missing_blank(place.path)):
        return Fault(path, "is read as a key without a value", blank)
    if kind == "extra_forbidden":
        return _unknown_key(place)
    if kind == "missing":
        return Fault(path, "is required", _EXAMPLES.get(path, ""))
    if kind == "too_short":
        return Fault(path, "must have at least one entry", _EXAMPLES.get(path, ""))
    if kind == "string_too_short":
        return Fault(path, "must not be empty text", _EXAMPLES.get(path, ""))
    if kind == "literal_error" and not place.is_union_itself:
        return _wrong_choice(path, place.annotation, got)
    if kind in _BOUNDS:
        expected = _BOUNDS[kind].format(**details.get("ctx", {}))
        return Fault(path, f"{expected}, got {show(got)}", _default_hint(place))
    annotation = shape.at(place.path) if place.is_union_itself else place.annotation
    expected = shape.words(annotation)
    got_words = show_kind(got) if expected.startswith("a mapping") else show(got)
    return Fault(path, f"must be {expected}, got {got_words}", _type_hint(place, annotation, got))


def _wrong_choice(path: str, annotation: Any, got: Any) -> Fault:
    choices = [str(choice) for choice in get_args(shape.members(annotation)[0])]
    meant = _OTHER_VALUES.get(path, {}).get(str(got))
    near = [meant] if meant else difflib.get_close_matches(str(got), choices, n=1)
    if near and len(choices) > _MANY_CHOICES:
        expected = f"must be one of {len(choices)} known values"
    else:
        expected = f"must be one of {', '.join(choices)}"
    hint = f"did you mean '{near[0]}'?" if near else ""
    return Fault(path, f"{expected}; got {show(got)}", hint)


def _type_hint(place: _Place, annotation: Any, got: Any) -> str:
    path = ".".join(str(part) for part in place.path)
    branches = shape.members(annotation)
    kinds = [shape.kind(branch) for branch in branches]
    if got is None:
        is_entry = isinstance(place.path[-1], int)
        removing = "remove the entry" if is_entry else "remove the key to get its default"
        return _EXAMPLES.get(path, removing)
    if isinstance(got, float) and int in kinds and got.is_integer():
        return f"write {int(got)}"
    if isinstance(got, str) and {int, float, bool} & set(kinds) and _reads_as(got, kinds):
        return f"write {got} without quotes"
    if isinstance(got, bool | int | float) and kinds == [str]:
        return "put it in quotes"
    if got is True and shape.is_spec(branches[0]) and path not in _EXAMPLES:
        return "write {} for its defaults"
    if kinds == [tuple] and not isinstance(got, list):
        inner = shape.members(get_args(branches[kinds.index(tuple)])[0])[0]
        return f"write [{_as_entry(inner, got)}]"
    if shape.is_spec(branches[0]) and isinstance(got, str) and path not in _EXAMPLES:
        entry = _as_entry(branches[0], got)
        return f"write {entry}" if entry.startswith("{") else ""
    return _EXAMPLES.get(path, "") or _default_hint(place)


def _default_hint(place: _Place) -> str:
    default = shape.default_of(place.path)
    return f"the default is {show(default)}" if isinstance(default, int | float | str) else ""


def _reads_as(text: str, kinds: Sequence[Any]) -> bool:
    """Whether the text, were it not in quotes, would be of one of the kinds."""
    try:
        value = parse_yaml(text, "a value")
    except RecipeError:
        return False
    return type(value) in kinds or (type(value) is int and float in kinds)


def _as_entry(annotation: Any, got: Any) -> str:
    """The value as an entry of a list, or of the spec whose one required key it gives."""
    if not shape.is_spec(annotation) or isinstance(got, dict):
        return "{…}" if isinstance(got, dict) else str(got)
    required = [name for name, field in annotation.model_fields.items() if field.is_required()]
    if len(required) == 1 and annotation.model_fields[required[0]].annotation is str:
        return f"{{{required[0]}: {got}}}"
    return "…"


def _missing_blank(path: Sequence[str | int]) -> str:
    """A hint where YAML has read `a:8` as a key, for want of a blank after the colon."""
    name, colon, value = str(path[-1] if path else "").rpartition(":")
    if not (name and colon and value):
        return ""
    return f"write '{name}: {value}', with a blank after the colon (in quotes on a command line)"


def _unknown_key(place: _Place) -> Fault:
    path = ".".join(str(part) for part in place.path)
    key = str(place.path[-1])
    parent = path.removesuffix(key)
    homes = shape.paths_of(key)
    homes_below = [home for home in homes if parent and home.startswith(parent)]
    if key in OTHER_NAMES and not homes_below:
        return Fault(path, "unknown key", f"here it is {OTHER_NAMES[key]}")
    if homes:
        return Fault(path, "unknown key here", f"it belongs at {' or '.join(homes_below or homes)}")
    spec = next(one for one in shape.members(shape.at(place.path[:-1])) if shape.is_spec(one))
    known = list(spec.model_fields)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
    return Fault(path, "unknown key", hint)
