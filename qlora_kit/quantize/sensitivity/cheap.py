r"""The cheap way: one forward and one backward pass for all layers at once.

Quantizing W changes what a layer says to a token by δ = ΔW x. To second order the divergence of
the model is then KL ≈ ½ E[(g·δ)²], g being the gradient of log p(y) with respect to what the
layer says, with y drawn from the model itself: the expectation of g gᵀ is the Fisher information
(Martens 2014, arXiv:1412.1193). `ESTIMATES` are ways to take that expectation from one draw.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.quantize.rounding import Rounding, image_of
from qlora_kit.report.reporter import Progress
from qlora_kit.runtime.batches import LOGITS_BYTES, scored_positions
from qlora_kit.runtime.forward import evaluation_mode, told_what_fails

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Estimate = Literal["output", "diagonal", "token", "row"]
ESTIMATES: dict[Estimate, str] = {
    "output": "Σ |δ|²: the error of what the layer says, whatever becomes of it",
    "diagonal": "½ Σ g²δ²: each number that the layer says on its own",
    "token": "½ Σ (g·δ)²: each token on its own",
    "row": "½ Σ (Σ g·δ)²: the tokens of a row together",
}
# The one whose order is closest to the measured one and stays the same on other rows
# (docs/sensitivity.md).
BEST: Estimate = "diagonal"
# Backward passes keep several copies of the logits.
_COPIES = 4

Sums = dict[str, dict[Estimate, float]]


def estimate_costs(
    model: PreTrainedModel,
    windows: Sequence[TokenSequence],
    modules: Sequence[str],
    roundings: Mapping[str, Rounding],
    compute_dtype: torch.dtype,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, Sums]:
    """Per rounding's name and module, every estimate in nats per token (`output`: no unit).

    `progress` counts tokens.
    """
    sums: dict[str, Sums] = {
        name: {module: defaultdict(float) for module in modules} for name in roundings
    }
    generator = torch.Generator(device=model.device).manual_seed(seed)
    with evaluation_mode(model), _listening(model, modules, roundings, sums):
        for batch in _batches(windows, model.config.get_text_config().vocab_size):
            _backward(model, batch, compute_dtype, generator)
            progress.update(sum(window.num_supervised for window in batch))
    num_tokens = sum(window.num_supervised for window in windows)
    return {
        name: {
            module: {key: value / num_tokens for key, value in found.items()}
            for module, found in by_module.items()
        }
        for name, by_module in sums.items()
    }


@contextmanager
def _listening(
    model: PreTrainedModel,
    modules: Sequence[str],
    roundings: Mapping[str, Rounding],
    sums: Mapping[str, Sums],
) -> Iterator[None]:
    """Every module's input and gradient meet in a hook; nothing is kept beyond it."""

    def on_forward(name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.register_hook(partial(on_backward, name, module, args[0].detach()))

    def on_backward(name: str, module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> None:
        for key, rounding in roundings.items():
            _add(sums[key][name], _change(module, rounding, x), g.float())

    handles = [
        model.get_submodule(name).register_forward_hook(partial(on_forward, name))
        for name in modules
    ]
    # No weight is trained, so the gradient has to begin at the embeddings.
    handles.append(
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.requires_grad_(True)
        )
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _change(module: nn.Module, rounding: Rounding, x: torch.Tensor) -> torch.Tensor:
    """δ, shape (..., out), in float32."""
    from transformers.pytorch_utils import Conv1D

    weight: Any = module.weight
    delta = (image_of(module, rounding) - weight.detach()).float()
    change: torch.Tensor = x.float() @ (delta if isinstance(module, Conv1D) else delta.T)
    return change


def _add(found: dict[Estimate, float], change: torch.Tensor, gradient: torch.Tensor) -> None:
    product = gradient * change
    by_token = product.sum(dim=-1)
    by_row = by_token.sum(dim=-1) if by_token.ndim > 1 else by_token.sum()
    found["output"] += float(change.square().sum())
    found["diagonal"] += 0.5 * float(product.square().sum())
    found["token"] += 0.5 * float(by_token.square().sum())
    found["row"] += 0.5 * float(by_row.square().sum())


def _backward(
    model: PreTrainedModel,
    batch: Sequence[TokenSequence],
    compute_dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """log p of tokens drawn from the model, summed over supervised positions, and its gradient."""
    ids = torch.tensor([window.input_ids for window in batch], device=model.device)
    is_scored = torch.zeros(ids.shape, dtype=torch.bool, device=model.device)
    for row, window in enumerate(batch):
        is_scored[row, [p - 1 for p in scored_positions(window)]] = True
    narrow = compute_dtype in (torch.bfloat16, torch.float16)
    with (
        told_what_fails(model),
        torch.enable_grad(),
        torch.autocast(model.device.type, compute_dtype, enabled=narrow),
    ):
        logits = model(input_ids=ids, use_cache=False).logits[is_scored]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    drawn = torch.multinomial(logprobs.detach().exp(), 1, generator=generator)
    logprobs.gather(1, drawn).sum().backward()


def _batches(
    windows: Sequence[TokenSequence], vocab_size: int
) -> Iterator[Sequence[TokenSequence]]:
    """Windows of one length at a time: nothing is padded, so nothing is counted that is none."""
    max_tokens = max(1, LOGITS_BYTES // (4 * vocab_size * _COPIES))
    by_length: dict[int, list[TokenSequence]] = defaultdict(list)
    for window in windows:
        by_length[len(window.input_ids)].append(window)
    for length, same in sorted(by_length.items(), reverse=True):
        rows = max(1, max_tokens // length)
        for start in range(0, len(same), rows):
            yield same[start : start + rows]
