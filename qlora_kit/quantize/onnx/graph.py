"""A causal language model as an ONNX graph: one step of decoding, the cache going in and out.

Names and shapes are those that Optimum's exports have, which other tools expect:
`input_ids`, `attention_mask`, `position_ids`, `past_key_values.N.key`, `.value` in; `logits`,
`present.N.key`, `.value` out. The first step of a text has a past of no tokens. A model whose
state is no cache of keys and values is exported without one.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_kit.errors import ModelError
from qlora_kit.model.reason import reason_of
from qlora_kit.quantize.onnx.experts import TRANSLATIONS
from qlora_kit.quantize.onnx.weights import turn_stored_weights
from qlora_kit.runtime.onnx_weights import PARAMETERS_KEY

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

GRAPH_FILE = "model.onnx"
# What upstream raises where a model does something that a graph cannot hold.
_NOT_EXPORTABLE = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)
# Sizes to trace with: none is 0 or 1, which torch takes for constants, and no two are alike.
_ROWS, _PAST, _NEW = 2, 5, 3

Past = list[tuple[torch.Tensor, torch.Tensor]]


class _Step(nn.Module):
    """The model with its cache as plain tensors."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None,
        past: Past,
    ) -> tuple[torch.Tensor, Past]:
        from transformers import DynamicCache

        places = {} if position_ids is None else {"position_ids": position_ids}
        cache = DynamicCache(past) if past else None
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=bool(past),
            **places,
        )
        layers = output.past_key_values.layers if past else ()
        return output.logits, [(layer.keys, layer.values) for layer in layers]


class _WholeStep(_Step):
    """Of a model that keeps no cache of keys and values."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        places = {} if position_ids is None else {"position_ids": position_ids}
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **places
        )
        logits: torch.Tensor = output.logits
        return logits


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether all that it remembers of a text are keys and values, one of each for every token."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    layers = DynamicCache(config=_text_config(model)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def export_graph(model: PreTrainedModel, path: Path) -> bool:
    """Write `path` and, beside it, its weights; returns whether it has a cache.

    Raises:
        ModelError: the model does what the exporter cannot follow.
    """
    past = _empty_past(model, _ROWS) if has_plain_cache(model) else []
    names = _names(len(past))
    takes_places = "position_ids" in inspect.signature(model.forward).parameters
    step = (_Step if past else _WholeStep)(model).eval()
    inputs, shapes = _example(past, takes_places)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                step,
                kwargs=inputs,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[n for n in names[0] if takes_places or n != "position_ids"],
                output_names=names[1],
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
        except _NOT_EXPORTABLE as error:
            raise ModelError(
                f"{model.config.model_type} cannot be exported to ONNX: torch's exporter stops at "
                f"{reason_of(_root(error))}; gguf:TYPE may take it."
            ) from error
        assert program is not None
        turn_stored_weights(program.model)
        program.model.metadata_props[PARAMETERS_KEY] = str(model.num_parameters())
        program.save(str(path), include_initializers=True, external_data=True)
    return bool(past)


def _empty_past(model: PreTrainedModel, rows: int) -> list[tuple[tuple[int, ...], ...]]:
    """The shapes of each layer's keys and values, with `_PAST` tokens, as the model makes them."""
    from transformers import DynamicCache

    cache = DynamicCache()
    ids = torch.zeros((rows, _PAST), dtype=torch.long)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return [(tuple(one.keys.shape), tuple(one.values.shape)) for one in layers]


def _example(
    past: Sequence[tuple[tuple[int, ...], ...]], takes_places: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs to trace with, and which of their dimensions vary."""
    length = _NEW + (_PAST if past else 0)
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros((_ROWS, _NEW), dtype=torch.long),
        "attention_mask": torch.ones((_ROWS, length), dtype=torch.long),
        "position_ids": None,
    }
    shapes: dict[str, Any] = {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_length"},
        "position_ids": None,
    }
    if takes_places:
        inputs["position_ids"] = torch.arange(length - _NEW, length).repeat(_ROWS, 1)
        shapes["position_ids"] = {0: "batch_size", 1: "sequence_length"}
    if past:
        inputs["past"] = [tuple(torch.zeros(shape) for shape in layer) for layer in past]
        varies = {0: "batch_size", 2: "past_length"}
        shapes["past"] = [(varies, varies) for _ in past]
    return inputs, shapes


def _names(num_layers: int) -> tuple[list[str], list[str]]:
    def of(stem: str) -> Iterator[str]:
        for number in range(num_layers):
            yield f"{stem}.{number}.key"
            yield f"{stem}.{number}.value"

    inputs = ["input_ids", "attention_mask", "position_ids", *of("past_key_values")]
    return inputs, ["logits", *of("present")]


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    return model.config.get_text_config()


def _root(error: BaseException) -> BaseException:
    """torch wraps what went wrong into advice about how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter tells of its own steps, and of kernels of packages that are not here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
