"""Which shortcuts a start takes: those of its checkpoint, those that an earlier start has tried on
the same model, libraries and machine, or else those that a trial proves now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit import kept
from qlora_kit.model.fused.attach import Fusion
from qlora_kit.model.fused.lean import LeanParts
from qlora_kit.model.fused.norm import NormKind
from qlora_kit.train.facts import facts_of
from qlora_kit.train.kernel_choice import BLOCKS, LIGER_PARTS
from qlora_kit.train.kernel_race import timed_tokens_of
from qlora_kit.train.product_choice import ONEDNN, ONEDNN_LOGITS, may_stay
from qlora_kit.train.shortcuts import SWITCHES, Shortcuts, choose_shortcuts

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.recipe import TrainSpec
    from qlora_kit.train.snapshot import Progress
    from qlora_kit.train.surroundings import Surroundings

_KIND = "shortcuts"
_SWITCHES = (*SWITCHES, "use_liger_kernel", "use_onednn", "blockwise_attention")
_DIFFERS = "processes came to different choices"


@dataclass(frozen=True)
class Choice:
    """What is taken, and for which model, libraries and machine that was found."""

    shortcuts: Shortcuts
    key: str | None
    """None where nobody can tell whether a later start is of the same kind."""

    @property
    def taken_key(self) -> str | None:
        """The same of the model with what is taken."""
        if self.key is None:
            return None
        return kept.key_of({"key": self.key, "taken": _taken(self.shortcuts)})

    def as_dict(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return {"key": self.key, "found": _as_values(self.shortcuts)}


def known_or_tried(
    model: PeftModel,
    spec: TrainSpec,
    around: Surroundings,
    is_sharded: bool,
    before: Progress | None,
    longest: int = 0,
) -> Choice:
    """The same on all processes; a warning where a checkpoint was trained with others.

    Args:
        before: of the checkpoint that training goes on from.
        longest: tokens of the longest example that attention in blocks covers, of those that are
            attended to by themselves; 0: there is none.
    """
    key = None if is_sharded else key_of(model, spec, around.precision, longest)
    found = _of_checkpoint(before, key) or _of_cache(key)
    if found is None:
        found = choose_shortcuts(model, spec, around.precision, is_sharded, longest)
        if key is not None and not found.left:  # what was left out may be for want of memory
            kept.keep(_KIND, key, _as_values(found))
    # A clock may come to different choices where two kernels are as fast as each other.
    gathered = around.processes.gathered
    of_all = gathered(found.liger)
    onednn, reorders = all(gathered(found.onednn)), all(gathered(found.reorders))
    agreed = replace(
        found,
        liger=tuple(one for one in found.liger if all(one in other for other in of_all)),
        onednn=onednn,
        onednn_logits=all(gathered(found.onednn_logits)),
        reorders=reorders and onednn == found.onednn,
        blockwise=all(gathered(found.blockwise)),
    )
    if agreed != found:
        why = f"{found.why_kernels}; those that are faster for all processes are taken"
        found = replace(agreed, why_kernels=why)
    others = around.processes.gathered(_taken(found))
    if any(one != others[0] for one in others):
        found = Shortcuts(left=(_DIFFERS,))
    _tell_drift(before, found, around)
    return Choice(found, key)


def key_of(model: PeftModel, spec: TrainSpec, precision: str, longest: int = 0) -> str | None:
    """Of what decides which shortcuts are exact, and faster; None where nobody can tell."""
    facts = facts_of(model)
    if facts is None:
        return None
    switches = {name: getattr(spec, name) for name in _SWITCHES}
    how = {
        "precision": precision,
        "switches": switches,
        "weights may stay": may_stay(spec),
        "threads": torch.get_num_threads(),
        "attended": timed_tokens_of(longest),
    }
    return kept.key_of({**facts, **how})


def _of_checkpoint(before: Progress | None, key: str | None) -> Shortcuts | None:
    if before is None or key is None or before.shortcuts.get("key") != key:
        return None
    return _from_values(before.shortcuts["found"])


def _of_cache(key: str | None) -> Shortcuts | None:
    values = None if key is None else kept.recall(_KIND, key)
    return None if values is None else _from_values(values)


def _tell_drift(before: Progress | None, found: Shortcuts, around: Surroundings) -> None:
    """Where other ones are taken than the checkpoint was trained with."""
    if before is None or not before.shortcuts:
        return
    then = _from_values(before.shortcuts["found"])
    if _taken(then) == _taken(found):
        return
    around.reporter.warn(
        f"the checkpoint was trained with other shortcuts ({_counted(then)}) than are taken from "
        f"here on ({_counted(found)}): numbers may differ by rounding."
    )


def _counted(one: Shortcuts) -> str:
    num_layers = one.fusion.num_layers if one.fusion else 0
    loss = "logits at supervised places alone" if one.supervised_loss else "all logits"
    loss += ", the last MLP too" * (one.last_mlp is not None)
    liger = [LIGER_PARTS[name] for name in one.liger]
    kernels = f", Liger's kernels for {', '.join(liger)}" * bool(liger)
    kernels += f", {ONEDNN}" * one.onednn
    kernels += f", {ONEDNN_LOGITS}" * one.onednn_logits
    kernels += f", {BLOCKS}" * one.blockwise
    return (
        f"{loss}, {num_layers} fused LoRA layers, {len(one.lean.mlps)} MLPs and "
        f"{one.lean.num_norms} norms that keep less, rotary embeddings as one operation in "
        f"{len(one.lean.rotary)} files{kernels}"
    )


def _taken(one: Shortcuts) -> dict[str, Any]:
    """Without what is only told, or gives the same bits."""
    values = _as_values(one)
    told = ("not_fused", "difference", "left", "why_kernels", "reorders", "layer_norms")
    return {name: one for name, one in values.items() if name not in told}


def _as_values(one: Shortcuts) -> dict[str, Any]:
    fusion = one.fusion
    return {
        "supervised_loss": one.supervised_loss,
        "groups": None if fusion is None else [list(group) for group in fusion.groups],
        "not_fused": {} if fusion is None else dict(fusion.left),
        "mlps": list(one.lean.mlps),
        "norms": {name: asdict(kind) for name, kind in one.lean.norms.items()},
        "rotary": list(one.lean.rotary),
        "layer_norms": list(one.lean.layer_norms),
        "last_mlp": one.last_mlp,
        "liger": list(one.liger),
        "onednn": one.onednn,
        "onednn_logits": one.onednn_logits,
        "reorders": one.reorders,
        "blockwise": one.blockwise,
        "why_kernels": one.why_kernels,
        "difference": one.difference,
        "left": list(one.left),
    }


def _from_values(values: Mapping[str, Any]) -> Shortcuts:
    groups = values["groups"]
    lean = LeanParts(
        mlps=tuple(values["mlps"]),
        norms={name: NormKind(**kind) for name, kind in values["norms"].items()},
        rotary=tuple(values.get("rotary", ())),
        layer_norms=tuple(values.get("layer_norms", ())),
    )
    return Shortcuts(
        supervised_loss=values["supervised_loss"],
        fusion=None
        if groups is None
        else Fusion(tuple(map(tuple, groups)), Counter(values["not_fused"])),
        difference=values["difference"],
        left=tuple(values["left"]),
        lean=lean,
        last_mlp=values.get("last_mlp"),
        liger=tuple(values.get("liger", ())),
        onednn=values.get("onednn", False),
        onednn_logits=values.get("onednn_logits", False),
        reorders=values.get("reorders", False),
        blockwise=values.get("blockwise", False),
        why_kernels=values.get("why_kernels", ""),
    )
