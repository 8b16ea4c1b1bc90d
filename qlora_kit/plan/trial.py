"""A training step and an evaluation on tensors without numbers: what would be alive, when.

The model is the one that training has, adapter, shortcuts and recomputing layers included, and its
own code runs, forward and backward. Nothing is estimated but what operations take and give back
inside themselves, which no trial sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from qlora_kit.memory.allocator import holes_left_by
from qlora_kit.memory.kept import Kept, measure_kept, recomputing_layers
from qlora_kit.memory.live import UNPACKED, Component, LiveTensors
from qlora_kit.memory.weights import hold_weights
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.by_example import attending_by_example, can_attend_by_example
from qlora_kit.model.fused.at_places import last_of
from qlora_kit.model.fused.attach import Fusion, plan_fusion
from qlora_kit.model.fused.lean import LeanParts
from qlora_kit.model.fused.residents import NO_ROOM, Room
from qlora_kit.model.qat.aware import aware_of
from qlora_kit.plan.effort import CountedEffort, Effort
from qlora_kit.plan.few_layers import (
    BEGIN,
    BEHIND,
    Course,
    FewLayers,
    among,
    few_layers,
    fusion_of_all,
    in_place,
)
from qlora_kit.plan.numberless import Numberless
from qlora_kit.plan.residents import ImaginedResidents, on_a_trial, require_all_alike
from qlora_kit.plan.shape import Shape, batch_of
from qlora_kit.plan.stand_in import (
    dora_with_fewer_holes,
    give_tensors,
    stand_in_base,
    unpacked_for_dora,
)
from qlora_kit.plan.stand_in_codes import ImaginedCodes
from qlora_kit.plan.stand_in_parts import lean_parts_by_stand_ins
from qlora_kit.plan.stand_in_pass import (
    ImaginedForward,
    begin_training,
    kept_elsewhere,
    known_gradients,
)
from qlora_kit.plan.whole_rows import hiding_nothing
from qlora_kit.runtime.forward import CHUNK_CELLS
from qlora_kit.train.product_choice import will_reorder
from qlora_kit.train.recompute import able_to_recompute, recompute_first
from qlora_kit.train.shortcuts import Shortcuts, taken, why_no_supervised_loss
from qlora_kit.train.supervised_loss import supervised_only

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.model.skeleton import Skeleton
    from qlora_kit.model.vocabulary import Vocabulary
    from qlora_kit.recipe import Recipe, TrainSpec

CACHE = "cache of keys and values"
TRAINED = "trained weights"
HOLES = "holes in the heap"

_SHORT = (1, 8)
_NUM_SUPERVISED = 2  # as of the sequences that training counts
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Taken:
    """How a step is gone through."""

    num_recomputing: int = 0
    is_accumulated: bool = False
    """Whether gradients of other micro-batches are there already."""
    stays: Room = NO_ROOM
    """Room for frozen weights that stay."""
    offloads: bool = False
    """Whether what is kept waits in the host's memory."""
    gives_back: bool = False
    """Whether freed blocks go back to the system at once; see `large_blocks_given_back`."""


_T = TypeVar("_T")

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
        is_quick: bool = True,
    ):
        """Args: skeleton: built for this alone; precision: bf16, fp16 or fp32, of autocast.
            device: cpu or cuda, by which the size of a chunk of logits goes.
            is_quick: whether a few layers may stand for all that are alike.

        Raises:
            ModelError: it holds what is not known to a trial.
            AdapterError: the adapter does not suit the model.
        """
        self.compute_dtype = compute_dtype
        self.precision = precision
        self.device = device
        base = stand_in_base(skeleton, vocabulary, recipe.quantization, compute_dtype)
        spec = recipe.lora.model_copy(update={"init": "default"})
        merged = recipe.export.merge_options.dtype
        aware = aware_of(recipe.quantization_aware, merged, compute_dtype)
        with torch.device("meta"), unpacked_for_dora():
            adapted = attach_adapter(base, spec, recipe.train.seed, aware)
        self.model: PeftModel = adapted.model
        self.trains_weights = aware is not None and aware.spec.train == "full"
        self.causal = base.model
        self.compares = recipe.evaluate.baseline
        """Whether the model is measured without what was trained as well."""
        self.mode = Numberless()
        with self.mode:
            give_tensors(base.model, recipe.quantization, compute_dtype)
            self.codes = ImaginedCodes(self.model, device)
        self.num_entries = int(base.model.config.get_text_config().vocab_size)
        self.is_quick = is_quick
        self.why_all: list[str] = []
        """Of trials that a few layers were not enough for."""
        self.attention = str(base.model.config._attn_implementation)
        self.has_own_loss = (
            not recipe.train.fused_loss or why_no_supervised_loss(base.model) is not None
        )
        lean = _lean_parts(self.model, recipe.train)
        self.shortcuts = Shortcuts(
            fusion=self._fusion() if recipe.train.fused_lora else None,
            lean=lean,
            last_mlp=None if self.has_own_loss else last_of(self.model, lean.mlps),
        )
        self._train = recipe.train
        self._told: dict[tuple[Any, ...], Peak] = {}
        self._never_asked: dict[Room, int] = {}
        """By what stays, of its bytes in a step: see `ImaginedResidents.never_asked_bytes`."""

    def _fusion(self) -> Fusion:
        def found(few: FewLayers | None) -> Fusion:
            with self.mode, in_place(few):
                ids = torch.zeros(_SHORT, dtype=torch.long)
                mask = torch.ones_like(ids)
                with unpacked_for_dora():
                    fusion = plan_fusion(self.model, lambda: self.model(ids, mask, use_cache=False))
            return fusion if few is None else fusion_of_all(fusion, few, self.model)

        return self._told_by_few(found)

    def _told_by_few(self, trial: Callable[[FewLayers | None], _T], num_recomputing: int = 0) -> _T:
        """What a trial tells that goes through a few layers where they can stand for all, and
        through all of them where that comes to nothing.
        """
        config = self.causal.config.get_text_config()
        few = few_layers(self.model, config, num_recomputing) if self.is_quick else None
        if few is not None:
            try:
                return trial(few)
            except Exception as error:  # also of code that counts on all of its layers
                self.why_all.append(f"{type(error).__name__}: {error}")
                self.model.zero_grad()
        return trial(None)

    @property
    def _dtype_of_products(self) -> torch.dtype:
        return _AUTOCAST.get(self.precision, self.compute_dtype)

    @property
    def num_layers(self) -> int:
        """That can recompute."""
        is_able = self.causal.supports_gradient_checkpointing
        return len(recomputing_layers(self.model)) if is_able else 0

    @cached_property
    def reorders(self) -> bool:
        """Whether weights that stay lie in oneDNN's layout; timed where nobody has done so."""
        where = (torch.device(self.device), self.compute_dtype, self.precision)
        return will_reorder(self.model, self._train, *where)

    @property
    def trained(self) -> list[torch.Tensor]:
        return [one for one in self.model.parameters() if one.requires_grad]

    @property
    def weights(self) -> Peak:
        """Of the loaded model with its adapter."""
        return self._loaded().peak

    @property
    def standing(self) -> Peak:
        """Of the same, with the copies that it computes with where it is aware of quantization."""
        return self._before().peak

    def _before(self, with_base: bool = False) -> LiveTensors:
        """What is there before a trial, and what counts it: an update has made the copies old."""
        live = self._loaded()
        self.codes.hold(live, with_base)
        self.codes.age()
        return live

    def _loaded(self) -> LiveTensors:
        live = LiveTensors(self.num_entries)
        hold_weights(self.model, live)
        if self.trains_weights:
            live.hold(self.trained, TRAINED)
            live.forget_peak()
        return live

    @cached_property
    def kept(self) -> Kept:
        """What forward passes keep, counted as training counts it."""

        is_seen = self._is_seen()

        def run(length: int) -> torch.Tensor:
            return self._loss(batch_of(Shape(((length,),), _NUM_SUPERVISED), is_seen))

        self.codes.age(False)

        def found(few: FewLayers | None) -> Kept:
            with self._computing(_NUM_SUPERVISED, is_seen), in_place(few):
                begin_training(self.model)
                if few is None:
                    return measure_kept(self.model, run)
                chosen = few.chosen

                def of_all(each: Sequence[Any]) -> Sequence[Any]:
                    return few.of_all(dict(zip(chosen, each, strict=True)))

                return measure_kept(self.model, run, of_all)

        kept = self._told_by_few(found)
        self.model.eval()
        return kept

    def _is_seen(self, shape: Shape | None = None) -> bool:
        """Whether attention goes by positions, and needs no mask."""
        is_able = shape is None or (shape.by_example and not shape.is_masked)
        return is_able and can_attend_by_example(self.causal)

    def step(self, shape: Shape, how: Taken) -> Peak:
        """The peak of forward and backward passes, optimizer apart; on a CPU with the holes that
        freed tensors leave in the C library's heap.
        """
        return self._once(self._step, shape, how)

    def effort(self, shape: Shape, num_recomputing: int, num_micro_batches: int = 1) -> Effort:
        """What forward and backward passes have to do, of as many micro-batches an update on the
        average: the first alone quantizes what is trained anew.
        """
        first = self._effort(shape, num_recomputing, is_first=True)
        if num_micro_batches == 1 or not self.codes.trained:
            return first
        other = self._effort(shape, num_recomputing, is_first=False)
        return first.averaged(other, num_micro_batches)

    def _effort(self, shape: Shape, num_recomputing: int, is_first: bool) -> Effort:
        def found(few: FewLayers | None) -> Effort:
            counting = CountedEffort()
            self.codes.age(is_first)
            course = Course(few, counts=lambda: vars(counting.effort))
            with self._on(shape) as batch, counting, in_place(few):
                with self._recomputing(among(few, num_recomputing)), course.watched():
                    begin_training(self.model)
                    self._loss(batch).backward()
                self.model.zero_grad()
                self.model.eval()
            return Effort(**course.counted)

        return self._told_by_few(found, num_recomputing)

    def held_out_loss(self, shape: Shape, stays: Room = NO_ROOM) -> Peak:
        """The peak of a forward pass in evaluation while training goes on, with the weights that
        stay. Ask for a step with the same ones before.
        """
        return self._once(self._held_out_loss, shape, stays)

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

    def _step(self, shape: Shape, how: Taken) -> Peak:
        return self._told_by_few(partial(self._step_of, shape, how), how.num_recomputing)

    def _step_of(self, shape: Shape, how: Taken, few: FewLayers | None) -> Peak:
        live = self._before()
        gradients = sum(one.nbytes for one in self.trained) * how.is_accumulated
        residents = on_a_trial(how.stays, live, self.causal, gradients)
        course = Course(few, live)
        with self._on(shape, residents) as batch, live, in_place(few):
            residents.hold_head(self._dtype_of_products)
            with self._recomputing(among(few, how.num_recomputing)):
                begin_training(self.model)
                offloaded = kept_elsewhere(how.offloads)
                with course.watched(), known_gradients(self.trained, live), offloaded:
                    for _ in range(1 + how.is_accumulated):
                        course.cut(BEGIN)
                        loss = self._loss(batch)
                        course.cut(BEHIND)
                        loss.backward()
                        del loss
            self.model.zero_grad()
            self.model.eval()
        require_all_alike(few, residents, course, how.stays)
        self._never_asked[how.stays] = residents.never_asked_bytes
        peak = self._asked_for(course.peak, how.stays)
        if self.device != "cpu" or how.gives_back:
            return peak
        recomputing = how.num_recomputing / max(self.num_layers, 1)
        return {**peak, HOLES: holes_left_by(course.passing_bytes, recomputing)}

    def _held_out_loss(self, shape: Shape, stays: Room) -> Peak:
        def found(few: FewLayers | None) -> Peak:
            live = self._before()
            residents = on_a_trial(stays, live, self.causal)
            course = Course(few, live)
            with self._on(shape, residents) as batch, live, torch.no_grad(), in_place(few):
                residents.hold_head(self._dtype_of_products)
                with course.watched():
                    self.model.eval()
                    self._loss(batch)
            require_all_alike(few, residents, course, stays)
            return self._asked_for(course.peak, stays)

        return self._told_by_few(found)

    def _asked_for(self, peak: Peak, stays: Room) -> dict[Component, int]:
        """Without weights that stay for gradients which no step has asked for."""
        found, never_asked = dict(peak), self._never_asked.get(stays, 0)
        if never_asked:
            found[UNPACKED] = found.get(UNPACKED, 0) - never_asked
        return found

    def _scoring(self, num_rows: int, num_tokens: int) -> Peak:
        return self._told_by_few(partial(self._scoring_of, num_rows, num_tokens))

    def _scoring_of(self, num_rows: int, num_tokens: int, few: FewLayers | None) -> Peak:
        shape = Shape(((num_tokens,),) * num_rows, 0, num_rows > 1, by_example=False)
        live = self._before(self.compares)
        course = Course(few, live)
        with self._on(shape) as batch, live, torch.no_grad(), in_place(few), course.watched():
            columns = torch.zeros(num_tokens - 1, dtype=torch.long)
            logits = self._forward(batch, logits_to_keep=columns).logits
            rows = [one[columns] for one in logits] if num_rows > 1 else [logits[0]]
            part = rows[0][: max(1, CHUNK_CELLS // self.num_entries)].float()
            torch.log_softmax(part, dim=-1)
        return course.peak

    def _answering(self, num_rows: int, num_prompt: int, num_new: int) -> Peak:
        live = self._before(self.compares)
        standing = live.peak
        shape = Shape(((num_prompt,),) * num_rows, 0, num_rows > 1, by_example=False)
        with self._on(shape) as batch, live, torch.no_grad():
            output = self._forward(batch, use_cache=True, logits_to_keep=1)
            before = sum(live.now.values())
            del output
            cache = before - sum(live.now.values())
        reading = live.peak
        longest = int(cache * (num_prompt + num_new) / num_prompt)
        if sum(reading.values()) > sum(standing.values()) + longest:
            return reading
        return {**standing, CACHE: longest}

    def _forward(self, batch: Mapping[str, torch.Tensor], **options: Any) -> Any:
        dtype = _AUTOCAST.get(self.precision)
        given = {name: value for name, value in batch.items() if name != "labels"}
        options = {"use_cache": False, **options}
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return self.model(**given, **options)

    def _loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        dtype = _AUTOCAST.get(self.precision)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss: torch.Tensor = self.model(**batch, use_cache=False).loss
        return loss

    @contextmanager
    def _on(
        self, shape: Shape, residents: ImaginedResidents | None = None
    ) -> Iterator[Mapping[str, torch.Tensor]]:
        """A batch of that shape, to be computed as training does."""
        is_seen = self._is_seen(shape)
        with self._computing(shape.num_supervised, is_seen, shape.is_masked, residents):
            yield batch_of(shape, is_seen)

    @contextmanager
    def _computing(
        self,
        num_supervised: int,
        is_seen: bool,
        is_masked: bool = False,
        residents: ImaginedResidents | None = None,
    ) -> Iterator[None]:
        """With the shortcuts that training takes."""
        with ExitStack() as stack:
            stack.enter_context(self.mode)
            stack.enter_context(unpacked_for_dora())
            live = None if residents is None else residents.live
            stack.enter_context(dora_with_fewer_holes(live))
            stack.enter_context(attending_by_example(self.causal, is_seen))
            stack.enter_context(hiding_nothing(self.causal, not is_masked))
            if not self.has_own_loss:
                make = partial(ImaginedForward, device=self.device, num_supervised=num_supervised)
                stack.enter_context(supervised_only(self.causal, make))
            stack.enter_context(taken(self.model, self.shortcuts, residents))
            yield

    @contextmanager
    def _recomputing(self, count: int) -> Iterator[None]:
        with able_to_recompute(self.model, "auto" if count else False):
            recompute_first(self.model, count)
            yield


def _lean_parts(model: Any, spec: TrainSpec) -> LeanParts:
    """Those that the recipe allows."""
    found = lean_parts_by_stand_ins(model)
    return LeanParts(
        found.mlps if spec.fused_mlp else (),
        found.norms if spec.fused_norm else {},
        found.rotary if spec.fused_rotary else (),
        found.layer_norms if spec.fused_norm else (),
    )
