"""One forward pass for measuring: precision, modes, and logits only where they are needed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, Union

import torch
from peft import PeftModel

from qlora_kit.data.collate import Collator
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import ModelError
from qlora_kit.model.reason import reason_of
from qlora_kit.model.without_bars import without_bars
from qlora_kit.out_of_memory import in_batches_that_fit, is_out_of_memory
from qlora_kit.report.reporter import Progress
from qlora_kit.runtime.batches import batch_windows, scored_positions
from qlora_kit.runtime.protocol import Scored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CausalModel: TypeAlias = Union["PreTrainedModel", PeftModel]

NO_PROGRESS = Progress()

# float32 copies of logits are made for this many numbers at a time.
CHUNK_CELLS = 2**24


@dataclass(frozen=True)
class CausalScorer:
    """A transformers model as something that scores windows; see `runtime.protocol.Scorer`."""

    model: CausalModel
    pad_token_id: int
    compute_dtype: torch.dtype | None = None

    @property
    def vocab_size(self) -> int:
        return vocab_size(self.model)

    def score(self, windows: Sequence[TokenSequence], batch_size: int) -> Iterator[Scored]:
        return score_windows(
            self.model,
            windows,
            pad_token_id=self.pad_token_id,
            batch_size=batch_size,
            compute_dtype=self.compute_dtype,
        )


@contextmanager
def inference_context(
    device: torch.device | str, compute_dtype: torch.dtype | None = None
) -> Iterator[None]:
    """No gradients, and autocast where the model computes in 16 bits.

    A base in 16 bits has adapters, and it may be norms, in float32, which only autocast brings
    together.
    None, like float32, means no autocast. `torch.inference_mode` is not used: whatever a module
    keeps from such a forward pass (rotary tables, repacked weights) could not be trained with.
    """
    with torch.no_grad():
        if compute_dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(torch.device(device).type, dtype=compute_dtype):
                yield
        else:
            yield


@contextmanager
def told_what_fails(model: CausalModel) -> Iterator[None]:
    """Around a forward pass. Memory that runs out is left to `in_batches_that_fit`.

    Raises:
        ModelError: transformers loads the model and cannot compute with it; says why.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{base_model_of(model).name_or_path} ({model.config.model_type}) was loaded and "
            f"cannot be run: {reason_of(error)}. Compare the sizes in its config.json with those "
            "of a model of this kind that works."
        ) from error


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """`model.eval()` while the context lasts; then every module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def score_windows(
    model: CausalModel,
    windows: Sequence[TokenSequence],
    *,
    pad_token_id: int,
    batch_size: int,
    compute_dtype: torch.dtype | None = None,
) -> Iterator[Scored]:
    """Logits at the supervised tokens of every window, longest windows first.

    Raises:
        ModelError: the model cannot be run, or logits are not a number; names the row.
    """
    keeps = _takes_logits_to_keep(model)
    batches = batch_windows(windows, batch_size, vocab_size(model), not keeps)

    def score(batch: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with (
            told_what_fails(model),
            without_bars(),  # of packed weights that are unpacked at the first pass
            evaluation_mode(model),
            inference_context(model.device, compute_dtype),
        ):
            return _score_batch(model, [windows[i] for i in batch], pad_token_id, keeps)

    for batch, scored in in_batches_that_fit(batches, score, model.device.type):
        for index, (logits, targets) in zip(batch, scored, strict=True):
            require_numbers(logits, windows[index].origin)
            yield Scored(index, logits, targets)


def base_model_of(model: CausalModel) -> PreTrainedModel:
    """The transformers model, inside its adapter's wrapper or as it stands."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def vocab_size(model: CausalModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def context_tokens(model: CausalModel) -> int | None:
    """How many tokens the model can attend to; None where its config sets no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def token_chunks(num_tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices of tokens whose logits are few enough to be copied to a wider dtype."""
    step = max(1, CHUNK_CELLS // vocabulary)
    for start in range(0, num_tokens, step):
        yield slice(start, start + step)


def _score_batch(
    model: CausalModel, batch: Sequence[TokenSequence], pad_token_id: int, keeps: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Padding stands on the right, where a causal model's earlier positions never see it."""
    tensors = Collator(pad_token_id)(batch)
    positions = [scored_positions(window) for window in batch]
    columns = sorted({p - 1 for row in positions for p in row})
    options = {"logits_to_keep": torch.tensor(columns)} if keeps else {}
    input_ids, attention_mask = tensors["input_ids"], tensors["attention_mask"]
    assert isinstance(input_ids, torch.Tensor)
    assert isinstance(attention_mask, torch.Tensor)
    output = model(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        use_cache=False,
        **options,
    )
    place = {p: number for number, p in enumerate(columns)} if keeps else None
    scored = []
    for number, (window, row) in enumerate(zip(batch, positions, strict=True)):
        kept = [place[p - 1] if place else p - 1 for p in row]
        logits = output.logits[number]
        if len(kept) < len(logits):
            logits = logits[torch.tensor(kept, device=logits.device)]
        targets = torch.tensor([window.labels[p] for p in row], device=logits.device)
        scored.append((logits, targets))
    return scored


def _takes_logits_to_keep(model: CausalModel) -> bool:
    return "logits_to_keep" in inspect.signature(base_model_of(model).forward).parameters


def require_numbers(logits: torch.Tensor, origin: str) -> None:
    """Of one window, named by its origin.

    Raises:
        ModelError: one of them is not a number.
    """
    if torch.isnan(logits).any():
        raise ModelError(
            f"the model's output for {origin} is not a number (NaN): its weights are damaged, or "
            "it overflows in this precision; try quantization.compute_dtype: float32."
        )
