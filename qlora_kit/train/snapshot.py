"""Everything that decides how training goes on, written into a checkpoint and put back.

The adapter is kept as PEFT keeps it, so that a checkpoint can be evaluated and merged; what
`digest_of` says of the trainable weights proves that putting it back changed no bit of them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from qlora_kit.checkpoint.tensors import load_values, save_values
from qlora_kit.errors import RunError
from qlora_kit.model.reason import reason_of
from qlora_kit.model.saved import WEIGHTS_FILE
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

PROGRESS_FILE = "progress.json"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
# Tokenizer, configurations, random states.
_OTHER_FILES_BYTES = 32 * 1024**2


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
    best_loss: float | None = None
    best_update: int | None = None
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
    trainables: str
    """Digest of the trainable weights' names, shapes and values."""
    optimizer: str
    """Digest of the optimizer's state."""


class Moving:
    """The parts of a training in progress that have a state."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: AcceleratedOptimizer | torch.optim.Optimizer,
        scheduler: Any,
        scaler: GradScaler | None,
    ):
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler

    def state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def put_back(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        page_again(self.optimizer)


@dataclass(frozen=True)
class Taken:
    """What `take` has gathered of a training in progress."""

    state: dict[str, Any]
    trainables: tuple[tuple[str, torch.Tensor], ...]
    optimizer_kind: str
    is_sharded: bool

    @property
    def num_bytes(self) -> int:
        """What it needs on the disk, nearly: the adapter and the optimizer's state."""
        tensors = [one for _, one in self.trainables]
        tensors += [one for _, one in _tensors_in(self.state["optimizer"]["state"])]
        return sum(one.numel() * one.element_size() for one in tensors) + _OTHER_FILES_BYTES


def take(moving: Moving) -> Taken:
    """On every process: of a sharded model each holds a part."""
    return Taken(
        whole_in(moving.state()),
        tuple(trainables_of(moving.model)),
        kind_of(moving.optimizer),
        is_sharded(moving.model),
    )


def write_snapshot(
    folder: Path,
    taken: Taken,
    progress: Progress,
    shape: dict[str, int],
    randoms: list[dict[str, Any]],
    write_adapter: Callable[..., None],
) -> Iterator[Path]:
    """Fill an empty folder; the largest files are yielded as they are finished.

    Args:
        shape: the numbers of `Shared`.
        randoms: `random_state()` of every process.
    """
    state = taken.state
    save_values(state, folder / OPTIMIZER_FILE)
    yield folder / OPTIMIZER_FILE
    if taken.is_sharded:
        write_adapter(folder, weights=dict(taken.trainables))
    else:
        write_adapter(folder)
    yield folder / WEIGHTS_FILE
    save_values(randoms, folder / RANDOM_FILE)
    shared = Shared(
        **shape,
        optimizer_kind=taken.optimizer_kind,
        trainables=digest_of(taken.trainables),
        optimizer=digest_of(_tensors_in(state["optimizer"]["state"])),
    )
    values = {**progress.as_dict(), **asdict(shared)}
    (folder / PROGRESS_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


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


def kind_of(optimizer: Any) -> str:
    """The class of an optimizer, and of how many bits its state is."""
    inner = getattr(optimizer, "optimizer", optimizer)
    bits = getattr(getattr(inner, "args", None), "optim_bits", 32)
    return f"{type(inner).__module__.partition('.')[0]}.{type(inner).__name__}, {bits} bits"


def read_snapshot(folder: Path, moving: Moving, allow_drift: bool = False) -> Progress:
    """Put everything back but the random states, which are for the moment before the next update.

    Another kind of optimizer begins without a state, where drift is allowed.

    Raises:
        RunError: what is put back is not what was written, bit for bit.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    progress, shared = read_progress(folder)
    try:
        weights = load_peft_weights(str(folder), device="cpu")
        set_peft_model_state_dict(moving.model, adapter_shared_out(weights, moving.model))
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_put_back("trainable weights", reason_of(error)) from error
    _require_same("trainable weights", digest_of(trainables_of(moving.model)), shared.trainables)
    kind = kind_of(moving.optimizer)
    if kind != shared.optimizer_kind:
        if not allow_drift:
            raise _not_put_back("optimizer's state", f"{kind}, written by {shared.optimizer_kind}")
        return progress
    try:
        state = load_values(folder / OPTIMIZER_FILE)
        state["optimizer"] = optimizer_shared_out(state["optimizer"], moving.optimizer)
        moving.put_back(state)
        now = digest_of(_tensors_in(whole_in(moving.optimizer.state_dict()["state"])))
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_put_back("optimizer's state", reason_of(error)) from error
    _require_same("optimizer's state", now, shared.optimizer)
    return progress


def _require_same(what: str, now: str, then: str) -> None:
    if now != then:
        raise _not_put_back(what, f"digest {now[:12]}, written {then[:12]}")


def _not_put_back(what: str, why: str) -> RunError:
    return RunError(
        f"the {what} could not be put back exactly as the checkpoint holds them ({why}): the "
        "model, the adapter or the optimizer is another than then. Train anew with --fresh."
    )


def trainables_of(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Each whole; on every process, where the model is sharded."""
    return ((name, whole(one)) for name, one in model.named_parameters() if one.requires_grad)


def digest_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the given order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _tensors_in(state: Any, name: str = "") -> Iterable[tuple[str, torch.Tensor]]:
    """Every tensor of a nested state, and every number as one, with the way to it."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key in sorted(state, key=str):
            yield from _tensors_in(state[key], f"{name}.{key}")
    elif isinstance(state, list | tuple):
        for number, one in enumerate(state):
            yield from _tensors_in(one, f"{name}.{number}")
    elif isinstance(state, int | float):
        yield name, torch.tensor(float(state), dtype=torch.float64)


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
    """None where the checkpoint was written by fewer processes."""
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
