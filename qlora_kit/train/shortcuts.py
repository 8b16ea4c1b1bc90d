"""What training does not have to compute as PEFT and transformers do: exact, tried on the model
before it is relied on, and left out, with a warning, where the trial comes out otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.data.sequences import IGNORE_INDEX
from qlora_kit.model.fused.at_places import FEWEST_TOKENS, AtPlaces, last_of
from qlora_kit.model.fused.attach import Fusion, fused, plan_fusion
from qlora_kit.model.fused.lean import NO_PARTS, LeanParts, lean, looking_for_lean_parts
from qlora_kit.model.fused.liger import GATED, NORM, ROTARY, why_no_liger
from qlora_kit.model.fused.remade import Origins
from qlora_kit.model.fused.replaced import replaced_forward
from qlora_kit.model.fused.residents import Residents
from qlora_kit.out_of_memory import is_out_of_memory
from qlora_kit.train.kernel_race import NUM_TOKENS, Raced, pair_of, raced, seconds_on_a_gpu
from qlora_kit.train.supervised_loss import SupervisedForward, supervised_only

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qlora_kit.recipe import TrainSpec

_TRIAL_SHAPE = (2, 16)
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Between one way of computing and the other: of the loss, and of a kernel by itself.
_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
# Of all gradients together: what bfloat16 rounds came to 0.047 in 30 layers.
_GRADIENT_TOLERANCE = {**_TOLERANCE, "bf16": 0.15}
_STIRRED = 0.02
_LOSS = "the loss of supervised places alone"
_LAST_MLP = "the last MLP at supervised places alone"
_LORA = "LoRA as one operation"
_ROTARY = "rotary embeddings as one operation"
_LIGER = "Liger's kernels"
LIGER_PARTS = {NORM: "norms", GATED: "gated MLPs", ROTARY: "rotary embeddings"}
SWITCHES = ("fused_loss", "fused_lora", "fused_mlp", "fused_norm", "fused_rotary")
"""Of a recipe's `train`, each for one of them."""
_SHARDED = "the model is shared out over several GPUs"
_RAN_OUT = "memory ran out on a trial of one short sequence"


@dataclass(frozen=True)
class Shortcuts:
    """Which are taken, and why others are not."""

    supervised_loss: bool = False
    fusion: Fusion | None = None
    """Also where it covers no layer, for the reasons."""
    difference: float = 0.0
    """Of the gradients on a trial, relative."""
    left: tuple[str, ...] = ()
    """What was asked for and cannot be, and why."""
    lean: LeanParts = NO_PARTS
    """Gated MLPs, norms and rotary embeddings that keep or take less."""
    liger: tuple[str, ...] = ()
    """Which of them Liger's kernels compute, of `model.fused.liger.OPERATIONS`."""
    last_mlp: str | None = None
    """That of the last layer, where it computes at supervised places alone."""
    why_kernels: str = ""
    """By what that was chosen, in a few words; empty where there is nothing to say."""


NONE = Shortcuts()


def choose_shortcuts(
    model: PeftModel, spec: TrainSpec, precision: str, is_sharded: bool
) -> Shortcuts:
    """Try what the recipe allows on a short batch: all at once, and where that comes out
    otherwise, one after the other.

    Args:
        precision: bf16, fp16 or fp32, of autocast.
    """
    if not any(getattr(spec, name) for name in SWITCHES):
        return NONE
    if is_sharded:
        return Shortcuts(left=(_SHARDED,))
    trial = _Trial(model, model.get_base_model(), precision)
    with trial.stirred():
        try:
            with looking_for_lean_parts(model) as seen:
                wanted = trial.outcome()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return Shortcuts(left=(_RAN_OUT,))
        candidates, left = _candidates(model, spec, trial, seen.parts)
        found, why = _tried(trial, wanted, NONE, [one for _, one in candidates])
        if why is not None:
            found = NONE
            for name, changes in candidates:
                found, why = _tried(trial, wanted, found, [changes])
                if why is not None:
                    left.append(f"{name}: {why}")
            if not found.supervised_loss:  # by which alone it is known where they are
                found = replace(found, last_mlp=None)
        found, without = _with_kernels(trial, wanted, found, spec)
    return replace(found, left=(*left, *without))


def _with_kernels(
    trial: _Trial, wanted: _Outcome, found: Shortcuts, spec: TrainSpec
) -> tuple[Shortcuts, list[str]]:
    """(with those of Liger's kernels that are exact and gain; what fails, and why)"""
    if not spec.use_liger_kernel or found.lean == NO_PARTS:
        return found, []
    is_asked_for = spec.use_liger_kernel is True
    why = why_no_liger(trial.device)
    if why is not None:
        if is_asked_for:
            return found, [f"{_LIGER}: {why}"]
        is_told = trial.device.type == "cuda"
        return replace(found, why_kernels=f"torch's own ({_LIGER}: {why})" * is_told), []
    left = []
    times: dict[str, Raced] = {}
    for name, part in LIGER_PARTS.items():
        found, one, fault = _with_kernel(name, trial, wanted, found, is_asked_for)
        if one is not None:
            times[name] = one
        if fault is not None:
            left.append(f"{_LIGER} for {part}: {fault}")
    return replace(found, why_kernels=_told(found, times)), left


def _with_kernel(
    name: str, trial: _Trial, wanted: _Outcome, found: Shortcuts, is_asked_for: bool
) -> tuple[Shortcuts, Raced | None, str | None]:
    """(with it where it is exact and gains, how fast it is, what is wrong with it)"""
    try:
        pair = pair_of(name, trial.model, found.lean, trial.dtype)
        if pair is None:
            return found, None, None
        one = raced(pair, seconds_on_a_gpu)
    except Exception as error:  # as above
        if is_out_of_memory(error):
            return found, None, f"memory ran out on {NUM_TOKENS:,} tokens"
        return found, None, f"it fails ({type(error).__name__}: {error})"
    if not one.apart <= _TOLERANCE[trial.precision]:
        return found, None, f"{one.apart:.2g} of their size off"
    if not (one.is_faster or is_asked_for):
        return found, one, None
    found, fault = _tried(trial, wanted, found, [{"liger": (*found.liger, name)}])
    return found, one if fault is None else None, fault


def _told(found: Shortcuts, times: Mapping[str, Raced]) -> str:
    """How fast each of Liger's kernels is, and which are taken."""
    if not times:
        return ""
    taken = [name for name in times if name in found.liger]
    others = [name for name in times if name not in found.liger]
    parts = []
    for whose, names in (("Liger's", taken), ("torch's own", others)):
        each = (f"{LIGER_PARTS[name]} ({times[name].gain:.2f} ×)" for name in names)
        if names:
            parts.append(f"{whose} for {', '.join(each)}")
    return "; ".join(parts) + f": time of torch's over Liger's on {NUM_TOKENS:,} tokens"


def _candidates(
    model: PeftModel, spec: TrainSpec, trial: _Trial, parts: LeanParts
) -> tuple[list[tuple[str, Mapping[str, Any]]], list[str]]:
    """(what may be taken, each with its name for people and the fields that it sets; why not)"""
    candidates: list[tuple[str, Mapping[str, Any]]] = []
    left = []
    if spec.fused_loss:
        why = why_no_supervised_loss(model.get_base_model())
        if why is None:
            candidates.append((_LOSS, {"supervised_loss": True}))
        else:
            left.append(f"{_LOSS}: {why}")
    if spec.fused_lora:
        candidates.append((_LORA, {"fusion": plan_fusion(model, trial.forward)}))
    if spec.fused_mlp and parts.mlps:
        candidates.append(("MLPs that keep less", {"lean": LeanParts(mlps=parts.mlps)}))
    last_mlp = last_of(model, parts.mlps) if spec.fused_mlp and spec.fused_loss else None
    if last_mlp is not None and not left:
        is_read_elsewhere = trial.is_read_elsewhere(last_mlp)
        if is_read_elsewhere:
            left.append(f"{_LAST_MLP}: the loss depends on what it gives at others")
        elif is_read_elsewhere is not None:
            candidates.append((_LAST_MLP, {"last_mlp": last_mlp}))
    if spec.fused_norm and parts.norms:
        candidates.append(("norms that keep less", {"lean": LeanParts(norms=parts.norms)}))
    if spec.fused_rotary and parts.rotary:
        candidates.append((_ROTARY, {"lean": LeanParts(rotary=parts.rotary)}))
    return candidates, left


def _tried(
    trial: _Trial,
    wanted: _Outcome,
    so_far: Shortcuts,
    changes: Sequence[Mapping[str, Any]],
) -> tuple[Shortcuts, str | None]:
    """(with the changes, or as it was where they come out otherwise; what was wrong)"""
    attempt = so_far
    for one in changes:
        lean = attempt.lean.joined(one.get("lean", NO_PARTS))
        attempt = replace(attempt, **{**one, "lean": lean})
    with taken(trial.model, attempt, least_tokens=1):
        why, apart = trial.compared(wanted)
    if why is not None:
        return so_far, why
    return replace(attempt, difference=apart), None


@contextmanager
def taken(
    model: PeftModel,
    shortcuts: Shortcuts,
    residents: Residents | None = None,
    least_tokens: int = FEWEST_TOKENS,
) -> Iterator[None]:
    """Compute so, while the context lasts.

    Args:
        residents: unpacked weights that stay, of fused layers.
        least_tokens: of a batch at some of whose places the last MLP computes nothing.
    """
    origins = Origins()
    with ExitStack() as stack:
        if shortcuts.supervised_loss:
            stack.enter_context(supervised_only(model.get_base_model()))
        if shortcuts.fusion is not None:
            stack.enter_context(fused(model, shortcuts.fusion, origins, residents))
        stack.enter_context(lean(model, shortcuts.lean, origins, shortcuts.liger))
        loss = model.get_base_model().forward
        if shortcuts.last_mlp is not None and isinstance(loss, SupervisedForward):
            mlp = model.get_submodule(shortcuts.last_mlp)
            narrowed = AtPlaces(mlp.forward, loss.places, least_tokens)
            stack.enter_context(replaced_forward(mlp, narrowed))
        yield


def why_no_supervised_loss(model: PreTrainedModel) -> str | None:
    """What a trial would not show."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "its loss has a part for the experts' routers"
    if model.base_model is model:
        return "its backbone is not apart from its head"
    return None


@dataclass(frozen=True)
class _Outcome:
    loss: float
    gradients: Sequence[torch.Tensor]


class _Trial:
    """A short batch of random tokens, in evaluation, so that nothing is drawn."""

    def __init__(self, model: PeftModel, causal: PreTrainedModel, precision: str):
        self.model = model
        self.precision = precision
        self.dtype = _AUTOCAST.get(precision, torch.float32)
        self.device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        entries = causal.config.get_text_config().vocab_size
        ids = torch.randint(0, entries, _TRIAL_SHAPE, generator=generator)
        is_left_out = torch.rand(_TRIAL_SHAPE, generator=generator) < 0.5
        self.ids = ids.to(self.device)
        self.labels = ids.masked_fill(is_left_out, IGNORE_INDEX).to(self.device)
        self.trained = [one for one in model.parameters() if one.requires_grad]

    @contextmanager
    def stirred(self) -> Iterator[None]:
        """With an adapter that does something: a fresh one's B is zero, and its A has no gradient.

        All is as it was afterwards, the random state included: it is not touched.
        """
        was_training = self.model.training
        kept = [one.detach().clone() for one in self.trained]
        generator = torch.Generator().manual_seed(1)
        self.model.eval()
        try:
            with torch.no_grad():
                for one in self.trained:
                    noise = torch.randn(one.shape, generator=generator) * _STIRRED
                    one.add_(noise.to(one))
            yield
        finally:
            with torch.no_grad():
                for one, before in zip(self.trained, kept, strict=True):
                    one.copy_(before)
            self.model.train(was_training)

    def forward(self) -> Any:
        with self._autocast():
            return self.model(input_ids=self.ids, labels=self.labels, use_cache=False)

    def outcome(self) -> _Outcome:
        with torch.enable_grad():
            loss = self.forward().loss
            gradients = torch.autograd.grad(loss, self.trained, allow_unused=True)
        found = [torch.zeros(()) if one is None else one.float() for one in gradients]
        return _Outcome(float(loss.detach()), found)

    def is_read_elsewhere(self, name: str) -> bool | None:
        """Whether the loss depends on what a module gives at places that are not supervised: then
        its gradient there is not zero, in whatever precision. None where it cannot be seen.
        """
        made: list[torch.Tensor] = []
        hook = self.model.get_submodule(name).register_forward_hook(
            lambda _, __, output: made.append(output)
        )
        try:
            with torch.enable_grad():
                loss = self.forward().loss
        finally:
            hook.remove()
        if len(made) != 1 or not made[0].requires_grad:
            return None
        (gradient,) = torch.autograd.grad(loss, made[0])
        if gradient.shape[:-1].numel() != self.labels.numel():
            return None
        by_place = gradient.reshape(*self.labels.shape, -1)
        return bool(by_place[:, :-1][self.labels[:, 1:] == IGNORE_INDEX].any())

    def compared(self, wanted: _Outcome) -> tuple[str | None, float]:
        """(what is wrong, how far the gradients are apart)"""
        try:
            found = self.outcome()
        except Exception as error:  # whatever a kernel or its compiler has to say
            return f"it fails ({type(error).__name__}: {error})", 0.0
        tolerance = _TOLERANCE[self.precision]
        if not abs(found.loss - wanted.loss) <= tolerance * max(abs(wanted.loss), 1.0):
            return f"on a trial the loss is {found.loss:.6g} instead of {wanted.loss:.6g}", 0.0
        pairs = list(zip(found.gradients, wanted.gradients, strict=True))
        off = sum(float((one - other).square().sum()) for one, other in pairs)
        size = sum(float(other.square().sum()) for _, other in pairs)
        apart = (off / size) ** 0.5 if size else 0.0
        if not apart <= _GRADIENT_TOLERANCE[self.precision]:
            return f"on a trial the gradients differ by {apart:.2g} of their size", apart
        return None, apart

    def _autocast(self) -> torch.autocast:
        dtype = _AUTOCAST.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)
