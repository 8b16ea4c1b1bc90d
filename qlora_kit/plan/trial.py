"""A training step and an evaluation on tensors without numbers: what would be alive, when.

The model is the one that training has, adapter, shortcuts and recomputing layers included, and its
own code runs, forward and backward. Nothing is estimated but what operations take and give back
inside themselves, which no trial sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.fused.attach import Fusion, plan_fusion
from qlora_kit.model.fused.gated import looks_gated
from qlora_kit.model.fused.lean import LeanParts
from qlora_kit.model.fused.norm import KINDS, looks_like_norm
from qlora_kit.model.quantized import is_four_bit, quant_state_tensors
from qlora_kit.memory.live import GRADIENTS, Component, LiveTensors
from qlora_kit.plan.stand_in import give_tensors, stand_in_base
from qlora_kit.runtime.forward import CHUNK_CELLS
from qlora_kit.train.recompute import able_to_recompute, recompute_first, recomputing_layers
from qlora_kit.train.shortcuts import Shortcuts, taken, why_no_supervised_loss
from qlora_kit.train.supervised_loss import SupervisedForward, supervised_only

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.model.skeleton import Skeleton
    from qlora_kit.model.vocabulary import Vocabulary
    from qlora_kit.recipe import Recipe, TrainSpec

PACKED, CONSTANTS = "4-bit weights", "their constants"
UNQUANTIZED, ADAPTER = "unquantized weights", "adapter"
CACHE = "cache of keys and values"

_SHORT = (1, 8)
_UNPADDED = "qlora_kit_unpadded"
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """Of a batch."""

    num_sequences: int
    num_tokens: int
    """Of each, padding included."""
    num_supervised: int
    """Of all together."""
    is_masked: bool
    """Whether there is padding, or several examples in a row, so that attention needs a mask."""


Peak = Mapping[Component, int]
"""Bytes by component, at the moment when they are most together."""


class ImaginedTraining:
    """The model of a recipe on tensors without numbers."""

    def __init__(
        self,
        recipe: Recipe,
        skeleton: Skeleton,
        vocabulary: Vocabulary,
        compute_dtype: torch.dtype,
        precision: str,
        device: str,
    ):
        """Args: skeleton: built for this alone; precision: bf16, fp16 or fp32, of autocast.
            device: cpu or cuda, by which the size of a chunk of logits goes.

        Raises:
            ModelError: it holds what is not known to a trial.
            AdapterError: the adapter does not suit the model.
        """
        self.compute_dtype = compute_dtype
        self.precision = precision
        self.device = device
        base = stand_in_base(skeleton, vocabulary, recipe.quantization, compute_dtype)
        spec = recipe.lora.model_copy(update={"init": "default"})
        with torch.device("meta"):
            adapted = attach_adapter(base, spec, recipe.train.seed)
        self.model: PeftModel = adapted.model
        self.causal = base.model
        self.mode = FakeTensorMode()
        with self.mode:
            give_tensors(base.model, recipe.quantization, compute_dtype)
        self.num_entries = int(base.model.config.get_text_config().vocab_size)
        self.attention = str(base.model.config._attn_implementation)
        self.has_own_loss = (
            not recipe.train.fused_loss or why_no_supervised_loss(base.model) is not None
        )
        self.shortcuts = Shortcuts(
            fusion=self._fusion() if recipe.train.fused_lora else None,
            lean=_lean_parts(self.model, recipe.train),
        )
        self._told: dict[tuple[Any, ...], Peak] = {}

    def _fusion(self) -> Fusion:
        with self.mode:
            ids = torch.zeros(_SHORT, dtype=torch.long)
            mask = torch.ones_like(ids)
            return plan_fusion(self.model, lambda: self.model(ids, mask, use_cache=False))

    @property
    def num_layers(self) -> int:
        """That can recompute."""
        is_able = self.causal.supports_gradient_checkpointing
        return len(recomputing_layers(self.model)) if is_able else 0

    @property
    def trained(self) -> list[torch.Tensor]:
        return [one for one in self.model.parameters() if one.requires_grad]

    @property
    def largest_packed(self) -> int:
        """Numbers of the largest weight that is quantized; 0 where none is."""
        states = (getattr(one, "quant_state", None) for one in self.model.parameters())
        return max((one.shape.numel() for one in states if one is not None), default=0)

    @property
    def weights(self) -> Peak:
        """Of the loaded model with its adapter."""
        live = LiveTensors()
        self._hold_weights(live)
        return live.peak

    def step(self, shape: Shape, num_recomputing: int, is_accumulated: bool) -> Peak:
        """The peak of forward and backward passes, optimizer apart.

        Args:
            is_accumulated: whether gradients of other micro-batches are there already.
        """
        return self._once(self._step, shape, num_recomputing, is_accumulated)

    def held_out_loss(self, shape: Shape) -> Peak:
        """The peak of a forward pass in evaluation while training goes on."""
        return self._once(self._held_out_loss, shape)

    def scoring(self, num_rows: int, num_tokens: int) -> Peak:
        """The peak of a batch whose perplexity is measured at all its places."""
        return self._once(self._scoring, num_rows, num_tokens)

    def answering(self, num_rows: int, num_prompt: int, num_new: int) -> Peak:
        """The peak of reading the prompts, or of the cache at its longest."""
        return self._once(self._answering, num_rows, num_prompt, num_new)

    def _once(self, trial: Callable[..., Peak], *arguments: Any) -> Peak:
        key = (trial.__name__, *arguments)
        if key not in self._told:
            self._told[key] = trial(*arguments)
        return self._told[key]

    def _step(self, shape: Shape, num_recomputing: int, is_accumulated: bool) -> Peak:
        live = LiveTensors(self.num_entries)
        self._hold_weights(live)
        with self._computing(shape) as batch, live:
            with self._recomputing(num_recomputing):
                self.model.train()
                with _known_gradients(self.trained, live):
                    for _ in range(1 + is_accumulated):
                        live.forget_peak()
                        self._loss(batch).backward()
                peak = live.peak
            self.model.zero_grad()
            self.model.eval()
        return peak

    def _held_out_loss(self, shape: Shape) -> Peak:
        live = LiveTensors(self.num_entries)
        self._hold_weights(live)
        with self._computing(shape) as batch, live, torch.no_grad():
            self.model.eval()
            self._loss(batch)
        return live.peak

    def _scoring(self, num_rows: int, num_tokens: int) -> Peak:
        shape = Shape(num_rows, num_tokens, 0, num_rows > 1)
        live = LiveTensors(self.num_entries)
        self._hold_weights(live)
        with self._computing(shape) as batch, live, torch.no_grad():
            columns = torch.zeros(num_tokens - 1, dtype=torch.long)
            logits = self._forward(batch, logits_to_keep=columns).logits
            rows = [one[columns] for one in logits] if num_rows > 1 else [logits[0]]
            part = rows[0][: max(1, CHUNK_CELLS // self.num_entries)].float()
            torch.log_softmax(part, dim=-1)
        return live.peak

    def _answering(self, num_rows: int, num_prompt: int, num_new: int) -> Peak:
        live = LiveTensors(self.num_entries)
        self._hold_weights(live)
        shape = Shape(num_rows, num_prompt, 0, num_rows > 1)
        with self._computing(shape) as batch, live, torch.no_grad():
            output = self._forward(batch, use_cache=True, logits_to_keep=1)
            before = sum(live.now.values())
            del output
            cache = before - sum(live.now.values())
        reading, weights = live.peak, self.weights
        longest = int(cache * (num_prompt + num_new) / num_prompt)
        if sum(reading.values()) > sum(weights.values()) + longest:
            return reading
        return {**weights, CACHE: longest}

    def _forward(self, batch: Mapping[str, torch.Tensor], **options: Any) -> Any:
        dtype = _AUTOCAST.get(self.precision)
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        options = {"use_cache": False, **options}
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return self.model(**given, **options)

    def _loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        dtype = _AUTOCAST.get(self.precision)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss: torch.Tensor = self.model(**batch, use_cache=False).loss
        return loss

    @contextmanager
    def _computing(self, shape: Shape) -> Iterator[Mapping[str, torch.Tensor]]:
        """With the shortcuts that training takes, a batch of that shape."""
        with ExitStack() as stack:
            stack.enter_context(self.mode)
            stack.enter_context(_attention(self.causal, shape.is_masked))
            if not self.has_own_loss:
                make = partial(
                    _ImaginedForward, device=self.device, num_supervised=shape.num_supervised
                )
                stack.enter_context(supervised_only(self.causal, make))
            stack.enter_context(taken(self.model, self.shortcuts))
            size = (shape.num_sequences, shape.num_tokens)
            yield {
                name: torch.zeros(size, dtype=torch.long)
                for name in ("input_ids", "attention_mask", "labels")
            }

    @contextmanager
    def _recomputing(self, count: int) -> Iterator[None]:
        with able_to_recompute(self.model, "auto" if count else False):
            recompute_first(self.model, count)
            yield

    def _hold_weights(self, live: LiveTensors) -> None:
        for parameter in self.model.parameters():
            if is_four_bit(parameter):
                state: Any = parameter.quant_state
                live.hold([parameter], PACKED)
                live.hold(quant_state_tensors(state), CONSTANTS)
            else:
                live.hold([parameter], ADAPTER if parameter.requires_grad else UNQUANTIZED)
        live.hold(self.model.buffers(), UNQUANTIZED)


class _ImaginedForward(SupervisedForward):
    """As many places as there are to be, since labels without numbers do not say which."""

    def __init__(self, model: Any, device: str, num_supervised: int):
        super().__init__(model)
        self.device = device
        self.num_supervised = num_supervised

    def num_at_a_time(self, device: str) -> int:
        return super().num_at_a_time(self.device)

    def places(self, targets: torch.Tensor) -> Any:
        count = min(self.num_supervised, targets.numel())
        return torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)


def _lean_parts(model: Any, spec: TrainSpec) -> LeanParts:
    """By what modules look like, where training tries their numbers too."""
    named = list(model.named_modules())
    mlps = [name for name, one in named if spec.fused_mlp and looks_gated(one)]
    norms = [name for name, one in named if spec.fused_norm and looks_like_norm(one)]
    kinds = {
        name: KINDS[type(model.get_submodule(name)).__name__.startswith("Gemma")] for name in norms
    }
    return LeanParts(tuple(mlps), kinds)


@contextmanager
def _known_gradients(trained: Sequence[torch.Tensor], live: LiveTensors) -> Iterator[None]:
    """Counted as such from the moment when they are complete."""

    def note(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            live.hold([parameter.grad], GRADIENTS)

    handles = [one.register_post_accumulate_grad_hook(note) for one in trained]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def _attention(model: Any, is_masked: bool) -> Iterator[None]:
    """Let attention do without a mask where it would see that nothing is padded, which a mask
    without numbers does not show.
    """
    own = model.config._attn_implementation
    if is_masked or own != "sdpa":
        yield
        return
    AttentionInterface.register(_UNPADDED, sdpa_attention_forward)
    AttentionMaskInterface.register(_UNPADDED, _mask_where_needed)
    model.set_attn_implementation(_UNPADDED)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _mask_where_needed(
    *arguments: Any,
    kv_length: int,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    is_whole = local_size is None or kv_length < local_size
    if allow_is_causal_skip and is_whole:
        return None
    mask: torch.Tensor | None = sdpa_mask(
        *arguments,
        kv_length=kv_length,
        local_size=local_size,
        allow_is_causal_skip=False,
        **options,
    )
    return mask
