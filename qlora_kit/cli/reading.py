"""What several verbs read in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qlora_kit.errors import DataError, Fault, RecipeError

if TYPE_CHECKING:
    from qlora_kit.recipe import DataSpec, EvaluateSpec, ModelSpec, Recipe


class Rows(NamedTuple):
    """What models are measured on; `model` is how a recipe reads the one that it names."""

    evaluate: EvaluateSpec
    data: DataSpec
    model: ModelSpec | None = None


def model_spec(name: str, trust_remote_code: bool, allow_pickle: bool) -> ModelSpec:
    """How a model is read that is named on the command line."""
    from qlora_kit.recipe import ModelSpec

    return ModelSpec(
        name_or_path=name, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )


def recipe_with_eval_rows(path: Path, overrides: list[str]) -> Recipe:
    """A recipe that says what is to be measured on.

    Raises:
        RecipeError: it is at fault, or names no source for that.
    """
    from qlora_kit.recipe import load_recipe

    loaded = load_recipe(path, overrides)
    if not loaded.data.has_eval_rows:
        raise RecipeError(
            str(path), [Fault("data.eval", "names no source to measure on", "add one")]
        )
    return loaded


def rows_of_text(text: Path, window: int) -> Rows:
    """What reads a text file through in a window of so many tokens, and asks nothing.

    Raises:
        DataError: it is not there, or no file.
    """
    from qlora_kit.recipe import DataSpec, EvaluateSpec, SourceSpec

    if not text.is_file():
        raise DataError(f"{text} does not exist." if not text.exists() else f"{text} is no file.")
    source = SourceSpec(path=str(text), format="text")
    data = DataSpec(train=(source,), eval=(source,), max_length=window)
    return Rows(EvaluateSpec(window_tokens=window), data)
