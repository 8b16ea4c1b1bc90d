"""Everything that decides how training goes on, written into a checkpoint and put back.

The adapter is kept as PEFT keeps it, so that a checkpoint can be evaluated and merged. What was put
back is compared with what the checkpoint holds, bit for bit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from qlora_kit.checkpoint.draft import Buffer, Draft
from qlora_kit.checkpoint.global_batch import PROGRESS_FILE
from qlora_kit.checkpoint.run_directory import OPTIMIZER_FILE
from qlora_kit.checkpoint.tensors import load_values, tensor_parts, value_parts
from qlora_kit.errors import RunError
from qlora_kit.model.manifest import MANIFEST_FILE
from qlora_kit.model.reason import reason_of
from qlora_kit.model.saved import WEIGHTS_FILE, AdapterFiles
from qlora_kit.train.rates import go_on
from qlora_kit.train.sharded import (
    adapter_shared_out,
    is_sharded,
    optimizer_shared_out,
    whole,
    whole_in,
)

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.amp import GradScaler

RANDOM_FILE = "random.safetensors"
STREAM_FILE = "stream.json"
_SETTINGS = ("betas", "eps", "weight_decay", "initial_lr")
# Of a file system: of each file's last block a part stays empty.
_BLOCK_BYTES = 4096
# Both manifests, at most so many for each file that they name.
_MANIFEST_BYTES = 1024 * 4


@dataclass
class Progress:
    """How far training has come, and what it has counted on the way."""

    update: int = 0
    """Updates made."""
    num_real_tokens: int = 0
    num_padding_tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    total_loss: float = 0.0
    """Summed over the updates."""
    unlogged_losses: tuple[float, ...] = ()
    """Of the updates since the last line of the log."""
    seconds: float = 0.0
    log_bytes: int = 0
    """Length of log.jsonl; what is behind it was logged by updates that will be made again."""
    eval_loss: float | None = None
    """After this very update; None where it was not evaluated."""
    is_evaluation_due: bool = False
    """After this very update, and a signal came before it was made."""
    fitted: dict[str, int | None] = field(default_factory=dict)
    """What did not fit the memory as the recipe has it, and how it does: see `train.fitting`."""
    shortcuts: dict[str, Any] = field(default_factory=dict)
    """Which were taken, and for which model and machine: see `train.known_shortcuts`."""
    order_digest: str = ""
    """Chained over the origins of every row trained on, update by update."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        known = {one.name for one in fields(cls)}
        given = {name: value for name, value in values.items() if name in known}
        given["unlogged_losses"] = tuple(given.get("unlogged_losses", ()))
        return cls(**given)


@dataclass(frozen=True)
class Shared:
    """What a resumed run has to share with the one that wrote the checkpoint."""

    items_per_update: int
    items_per_process: int
    """Of an update, by the recipe."""
    num_updates: int
    num_processes: int
    optimizer_kind: str


class Moving:
    """The parts of a training in progress that have a state."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: AcceleratedOptimizer | torch.optim.Optimizer,
        scheduler: Any,
        scaler: GradScaler | None,
        adapter: AdapterFiles,
    ):
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self.adapter = adapter
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.is_sharded = is_sharded(model)
        self._saved = {name: tensors[held] for name, held in adapter.names.items()}
        trainable = {id(one) for one in model.parameters() if one.requires_grad}
        left_out = trainable - {id(one) for one in self._saved.values()}
        assert not left_out, f"{len(left_out)} trainable tensors are not in the adapter's file"

    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors of the adapter's file by their names there, each whole: on every process,
        where the model is sharded.
        """
        return {name: whole(one) for name, one in self._saved.items()}

    def state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def put_back(self, state: dict[str, Any], update: int, is_same_kind: bool = True) -> None:
        """What was reached, under the settings of the recipe as it is now.

        A state holds the settings that it was made with too, the schedule's rates among them.

        Args:
            update: updates made.
            is_same_kind: whether the optimizer is of the kind that the state is of; where it is
                not, the state of the optimizer alone is left out.
        """
        groups = self.optimizer.param_groups
        settings = [_settings_of(group) for group in groups]
        if is_same_kind:
            self.optimizer.load_state_dict(state["optimizer"])
            groups = self.optimizer.param_groups
            for group, asked in zip(groups, settings, strict=True):
                group.update(asked)
        schedule = getattr(self.scheduler, "scheduler", self.scheduler)  # accelerate wraps it
        saved_groups = state["optimizer"]["param_groups"]
        go_on(schedule, groups, state["scheduler"], saved_groups, update)
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        page_again(self.optimizer)


@dataclass(frozen=True)
class Taken:
    """What `take` has gathered of a training in progress; still the tensors that are trained."""

    state: dict[str, Any]
    weights: dict[str, torch.Tensor]
    optimizer_kind: str
    adapter: AdapterFiles


def _settings_of(group: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says of a group of parameters; some optimizers count in their groups too."""
    return {name: group[name] for name in _SETTINGS if name in group}


def take(moving: Moving) -> Taken:
    """On every process: of a sharded model each holds a part."""
    return Taken(
        whole_in(moving.state()) if moving.is_sharded else moving.state(),
        moving.weights(),
        kind_of(moving.optimizer),
        moving.adapter,
    )


@dataclass(frozen=True)
class Snapshot:
    """The bytes of a checkpoint's files, which no later update changes, or none is to be made
    before they are written.
    """

    files: Mapping[str, Sequence[Buffer]]
    adapter: AdapterFiles

    @property
    def num_bytes(self) -> int:
        """What the checkpoint takes on the disk, at most some kilobytes less."""
        made = sum(len(part) for parts in self.files.values() for part in parts)
        kept = sum(map(len, self.adapter.unchanging.values()))
        num_files = len(self.files) + len(self.adapter.unchanging) + 2
        return made + kept + num_files * (_BLOCK_BYTES + _MANIFEST_BYTES)

    def write(self, draft: Draft) -> None:
        for name, content in self.adapter.unchanging.items():
            draft.put(name, [content], self.adapter.digests[name])
        for name, parts in self.files.items():
            draft.put(name, parts)
        draft.put(MANIFEST_FILE, [self.adapter.manifest_with(draft.sha256_of(WEIGHTS_FILE))])


def snapshot(
    taken: Taken,
    progress: Progress,
    shape: dict[str, int],
    randoms: list[dict[str, Any]],
    records: Mapping[str, bytes] | None = None,
    is_copied: bool = True,
) -> Snapshot:
    """Copy what was taken.

    Args:
        is_copied: False where training waits until it is written: then only what is small, or on
            a GPU, is copied.
        shape: the numbers of `Shared`.
        randoms: `random_state()` of every process.
        records: further files, by name.
    """
    shared = Shared(**shape, optimizer_kind=taken.optimizer_kind)
    values = {**progress.as_dict(), **asdict(shared)}
    files: dict[str, Sequence[Buffer]] = {
        WEIGHTS_FILE: tensor_parts(taken.weights, {"format": "pt"}, is_copied),
        OPTIMIZER_FILE: value_parts(taken.state, is_copied),
        RANDOM_FILE: value_parts(randoms),
        PROGRESS_FILE: [(json.dumps(values, indent=1) + "\n").encode()],
        **{name: [content] for name, content in (records or {}).items()},
    }
    return Snapshot(files, taken.adapter)


def read_progress(folder: Path) -> tuple[Progress, Shared]:
    """Raises RunError where the folder was written by something else."""
    try:
        values = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        shared = Shared(**{one.name: values[one.name] for one in fields(Shared)})
        return Progress.from_dict(values), shared
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder} is no checkpoint of this version ({type(error).__name__}: {error}). "
            "Go on with the version that wrote it, or train anew with --fresh."
        ) from None


def read_place(folder: Path) -> dict[str, Any] | None:
    """Where a stream of rows stood; None where there is none, or the version had no such file.

    Raises:
        RunError: it cannot be read.
    """
    if not (folder / STREAM_FILE).exists():
        return None
    with _readable(folder):
        return dict(json.loads((folder / STREAM_FILE).read_text(encoding="utf-8")))


def kind_of(optimizer: Any) -> str:
    """The class of an optimizer, and of how many bits its state is."""
    inner = getattr(optimizer, "optimizer", optimizer)
    bits = getattr(getattr(inner, "args", None), "optim_bits", 32)
    return f"{type(inner).__module__.partition('.')[0]}.{type(inner).__name__}, {bits} bits"


def read_snapshot(folder: Path, moving: Moving, allow_drift: bool = False) -> Progress:
    """Put everything back but the random states, which are for the moment before the next update.

    Another kind of optimizer begins without a state, where drift is allowed; the schedule goes on.

    Raises:
        RunError: what is put back is not what was written, bit for bit, or cannot be read.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    progress, shared = read_progress(folder)
    try:
        with _readable(folder):
            weights = load_file(folder / WEIGHTS_FILE)
        set_peft_model_state_dict(moving.model, adapter_shared_out(weights, moving.model))
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_put_back("trainable weights", reason_of(error)) from error
    _require_same("trainable weights", moving.weights(), weights)
    kind = kind_of(moving.optimizer)
    is_same_kind = kind == shared.optimizer_kind
    if not is_same_kind and not allow_drift:
        raise _not_put_back("optimizer's state", f"{kind}, written by {shared.optimizer_kind}")
    try:
        with _readable(folder):
            state = load_values(folder / OPTIMIZER_FILE)
        if not is_same_kind:
            moving.put_back(state, progress.update, is_same_kind=False)
            return progress
        shared_out = optimizer_shared_out(state["optimizer"], moving.optimizer)
        moving.put_back({**state, "optimizer": shared_out}, progress.update)
        now = whole_in(moving.optimizer.state_dict()["state"])
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_put_back("optimizer's state", reason_of(error)) from error
    _require_same("optimizer's state", now, state["optimizer"]["state"])
    return progress


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Around reading a file of a checkpoint that was whole when the run was entered.

    Raises:
        RunError: it cannot be read.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"{folder} was whole and now cannot be read ({reason_of(error)}). Look after the disk; "
            "the same command then goes on from the newest checkpoint that is whole."
        ) from error


def _require_same(what: str, now: Any, then: Any) -> None:
    """Raises RunError where two nested states are not alike to the bit."""
    place = difference(now, then)
    if place is not None:
        raise _not_put_back(what, f"{place} differs")


def _not_put_back(what: str, why: str) -> RunError:
    return RunError(
        f"the {what} could not be put back exactly as the checkpoint holds them ({why}): the "
        "model, the adapter or the optimizer is another than then. Train anew with --fresh."
    )


def difference(one: Any, other: Any, place: str = "") -> str | None:
    """Where two nested states first differ in a bit, a shape or a dtype; None where nowhere."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return None if _form_of(one) == _form_of(other) and _equal(one, other) else place
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{place or 'what is in it'} (other names)"
        keys = one.keys()
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{place} (another length)"
        keys = range(len(one))  # type: ignore[assignment]
    else:
        is_same = type(one) is type(other) and (one == other or (one != one and other != other))
        return None if is_same else place
    places = (difference(one[key], other[key], f"{place}.{key}".strip(".")) for key in keys)
    return next((found for found in places if found is not None), None)


def _form_of(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bytes, so that NaN is itself and 0 is not -0."""
    left, right = (each.detach().cpu().contiguous().view(-1) for each in (one, other))
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def random_state() -> dict[str, Any]:
    """Of this process: Python, NumPy, torch, and the device it trains on."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": (version, internal, gauss),
        "numpy": (str(kind), [int(key) for key in keys], position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def put_random_state_back(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def read_random_state(folder: Path, rank: int) -> dict[str, Any] | None:
    """None where the checkpoint was written by fewer processes.

    Raises:
        RunError: it cannot be read.
    """
    with _readable(folder):
        states = load_values(folder / RANDOM_FILE)
    return dict(states[rank]) if rank < len(states) else None


def page_again(optimizer: Any) -> None:
    """Move the state that a paged optimizer has loaded back into paged memory.

    bitsandbytes pages what it makes itself, and keeps what it loads as plain device memory.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not getattr(inner, "is_paged", False):
        return
    for parameter, state in inner.state.items():
        if not isinstance(parameter, torch.Tensor) or parameter.device.type != "cuda":
            continue
        for name in ("state1", "state2"):
            held = state.get(name)
            if isinstance(held, torch.Tensor) and not getattr(held, "is_paged", False):
                paged = inner.get_state_buffer(parameter, dtype=held.dtype)
                paged.copy_(held)
                state[name] = paged
