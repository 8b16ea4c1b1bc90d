"""What stands around the machine: disks, the hub, optional packages. Needs no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from qlora_kit.doctor.apart import Outcome
from qlora_kit.doctor.findings import Finding
from qlora_kit.extras import PURPOSES, fault_of

TRACKERS = ("tensorboard", "wandb", "mlflow")

_GIB = 1024**3
_LOW_DISK_BYTES = 5 * _GIB


def disk_findings(folders: Iterable[Path]) -> Iterator[Finding]:
    """Room on each disk where one of the folders is, or would be made."""
    on_disk: dict[int, list[Path]] = {}
    for folder in folders:
        on_disk.setdefault(_existing(folder).stat().st_dev, []).append(folder)
    for sharing in on_disk.values():
        free = shutil.disk_usage(_existing(sharing[0])).free
        found = f"{free / _GIB:,.1f} GiB free for {', '.join(map(str, sharing))}"
        means = f"room for a model of {free / 2e9:,.1f} B parameters in 16 bits (2 bytes each)"
        locked = [str(folder) for folder in sharing if not os.access(_existing(folder), os.W_OK)]
        if locked:
            means = f"{', '.join(locked)} cannot be written to; choose another folder"
        has_room = free >= _LOW_DISK_BYTES and not locked
        yield Finding("disk", "ok" if has_room else "note", found, means, {"free_bytes": free})


def hub_finding(is_offline: bool, outcome: Outcome | None) -> Finding:
    """The model hub; `outcome` holds what its answer lacked, None where it was not asked."""
    means = (
        "a model's hub id works only where it was downloaded before (`hf download`); folders, "
        "GGUF files and demo/ models always do"
    )
    if is_offline or outcome is None:
        found = "offline, as HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE says; it was not asked"
        return Finding("hub", "note", found, means)
    problem = outcome.fault or outcome.value
    if problem:
        return Finding("hub", "missing", f"not reachable: {problem}", means)
    return Finding("hub", "ok", "the model hub answers")


def optional_findings(device: str) -> Iterator[Finding]:
    """Packages that only some recipes ask for."""
    for tracker in TRACKERS:
        if _is_there(tracker):
            yield Finding(tracker, "ok", "installed")
        else:
            means = f"train.report_to: [{tracker}] needs pip install 'qlora-kit[{tracker}]'"
            yield Finding(tracker, "missing", "not installed", means)
    yield from extra_findings()
    has_kernels = _is_there("kernels")
    if _is_there("flash_attn"):
        where = "" if device == "cuda" else "of no use without a GPU"
        yield Finding("flash-attn", "ok", "installed", where)
    else:
        means = "attn_implementation: auto takes torch's own SDPA; flash_attention_2 " + (
            "fetches compiled code from the hub (kernels)" if has_kernels else "fails"
        )
        yield Finding("flash-attn", "missing", "not installed", means)
    if has_kernels:
        means = "transformers and bitsandbytes may fetch compiled code from the hub through it"
        yield Finding("kernels", "note", "installed", means)
    else:
        yield Finding("kernels", "missing", "not installed", "nothing here needs it")


def extra_findings() -> Iterator[Finding]:
    """What some verbs need and the kit itself does not bring."""
    for name, purpose in PURPOSES.items():
        fault = fault_of(name)
        if fault is None:
            yield Finding(name, "ok", "installed", purpose)
            continue
        means = f"{purpose} needs pip install 'qlora-kit[{name}]'"
        yield Finding(name, "missing", f"needs {fault}", means)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _is_there(module: str) -> bool:
    return find_spec(module) is not None
