"""The one place that calls llmcompressor, with what it says on the way."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from qlora_kit.errors import ModelError
from qlora_kit.model.reason import reason_of
from qlora_kit.model.without_bars import without_bars
from qlora_kit.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora_kit.data.sequences import TokenSequence
    from qlora_kit.report.reporter import Progress

_WARNING = "WARNING"
# What the user knows: `doctor` and the reporter tell which device it is.
_KNOWN = "No accelerator available"


def quantize_with(
    modifiers: Sequence[Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[TokenSequence],
    names: Collection[str],
    progress: Progress,
) -> list[str]:
    """Quantize a model in place, block by block: each sees what the quantized ones before it make
    of the calibration text. Returns what llmcompressor warns of. `progress` counts `names`.

    One block's weights are worked on at a time; in memory stand the model, the hidden states of
    all the text (4 bytes · tokens · width), and for GPTQ a matrix of inputs² for each layer of
    the block.

    Raises:
        ModelError: llmcompressor cannot follow the model.
    """
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session

    hooks = [_once(model.get_submodule(name), progress) for name in names]
    with _heard() as warnings, without_bars():
        try:
            oneshot(
                model=model,
                processor=tokenizer,
                recipe=list(modifiers),
                dataset=_batches(sequences),
                num_calibration_samples=len(sequences),
                max_seq_length=max(len(one.input_ids) for one in sequences),
                pipeline="sequential",
            )
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"llmcompressor cannot quantize {model.config.model_type}: {reason_of(error)}"
            ) from error
        finally:
            reset_session()
            for hook in hooks:
                hook.remove()
    return warnings


def _batches(sequences: Sequence[TokenSequence]) -> DataLoader[Any]:
    """One sequence at a time, so that none needs padding."""
    rows = [
        {
            "input_ids": torch.tensor(one.input_ids),
            "attention_mask": torch.ones(len(one.input_ids), dtype=torch.long),
        }
        for one in sequences
    ]
    return DataLoader(rows, batch_size=1, shuffle=False)  # type: ignore[arg-type]


def _once(module: torch.nn.Module, progress: Progress) -> Any:
    """Count a layer when text first reaches it."""
    seen: list[bool] = []

    def forward(*_: object) -> None:
        if not seen:
            seen.append(True)
            progress.update()

    return module.register_forward_hook(forward)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """llmcompressor tells everything on stdout; only its warnings are kept, for the caller.

    torch's tracer, which it uses, advises those who call its functions.
    """
    from llmcompressor.logger import LoggerConfig, configure_logger
    from loguru import logger

    told: list[str] = []

    def keep(message: Any) -> None:
        text = str(message.record["message"])
        if text not in told and not text.startswith(_KNOWN):
            told.append(text)

    tracer = logging.getLogger("torch.fx._symbolic_trace")
    level = tracer.level
    tracer.setLevel(logging.ERROR)
    configure_logger(LoggerConfig(console_log_level=None))
    sink = logger.add(
        keep, level=_WARNING, filter=lambda record: bool(record["level"].name == _WARNING)
    )
    try:
        yield told
    finally:
        logger.remove(sink)
        tracer.setLevel(level)
