"""A base quantized once on a machine: one process leaves the result in the cache, others read it.

The folder's name is made of everything that decides the numbers, so that whoever asks for the
same finds it: the other processes, and the same run when it is gone on with. One that nobody
has used for a month is removed when another is written or read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from qlora_kit.atomic import ANOTHER_CACHE, published_folder, require_disk
from qlora_kit.environment import cache_dir, package_versions
from qlora_kit.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_STATE_FILE = "state.json"
_STAMP = "used"
_UNUSED_SECONDS = 30 * 24 * 3600
_SAMPLE_ELEMENTS = 1024
_OTHER_FILES_BYTES = 32 * 1024**2
_DECIDING = ("torch", "transformers", "bitsandbytes")


def shared_folder(
    fingerprint: str, config: dict[str, Any], dtype: torch.dtype, device: str
) -> Path:
    """Where a base with this fingerprint is kept, quantized as `config` says (bitsandbytes').

    A GPU may round otherwise than a CPU, so the device counts.
    """
    versions = package_versions()
    facts = {
        "base": fingerprint,
        "quantization": config,
        "dtype": str(dtype),
        "device": device,
        "versions": {name: versions[name] for name in _DECIDING},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_dir() / "quantized" / digest[:32]


def load_shared(folder: Path, load: Callable[[Path | None], PreTrainedModel]) -> PreTrainedModel:
    """What is in `folder`, or else what is loaded anew and left there.

    Args:
        load: from the given folder, or from the base itself.

    Raises:
        HardwareError: there is no room for it.
    """
    kept = _read_kept(folder, load) if folder.is_dir() else None
    if kept is not None:
        _stamp(folder)
        return kept
    shutil.rmtree(folder, ignore_errors=True)
    model = load(None)
    num_bytes = sum(one.numel() * one.element_size() for one in model.state_dict().values())
    require_disk(folder, num_bytes + _OTHER_FILES_BYTES, "the quantized base", ANOTHER_CACHE)
    dtype = model.config.dtype
    with published_folder(folder) as draft:
        model.save_pretrained(draft)
        checksum = {"checksum": state_checksum(model)}
        (draft / _STATE_FILE).write_text(json.dumps(checksum) + "\n", encoding="utf-8")
    model.config.dtype = dtype  # which saving turns into a text
    _stamp(folder)
    return model


def _read_kept(
    folder: Path, load: Callable[[Path | None], PreTrainedModel]
) -> PreTrainedModel | None:
    """None where it is damaged."""
    try:
        values = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
        model = load(folder)
        return model if state_checksum(model) == values["checksum"] else None
    except (OSError, ValueError, KeyError, SafetensorError, ModelError):
        return None


def state_checksum(model: nn.Module) -> str:
    """Of every weight and every quantization state: all words summed, and the ends of each.

    The same wherever they are, on a CPU or a GPU.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        ends = torch.cat([flat[:_SAMPLE_ELEMENTS], flat[-_SAMPLE_ELEMENTS:]]).cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_word_sum(flat)}".encode())
        digest.update(ends.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_same_base(checksums: Sequence[str]) -> None:
    """`state_checksum` of every process, in the order of ranks.

    Raises:
        ModelError: they differ: gradients of different models would be averaged.
    """
    other = [rank for rank, one in enumerate(checksums) if one != checksums[0]]
    if other:
        raise ModelError(
            f"processes {', '.join(map(str, other))} hold other base weights than process 0, "
            "although they have read the same files; quantized on another kind of GPU they may "
            "round otherwise. Train on GPUs of one kind, or let QLORA_KIT_CACHE name a folder "
            "that all machines share."
        )


def _word_sum(flat: torch.Tensor) -> int:
    """The sum of all 8-byte words modulo 2^64, and of the bytes that are left over."""
    data = flat.contiguous().view(torch.uint8)
    if data.data_ptr() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    words = int(data[:whole].view(torch.int64).sum())
    return words + int(data[whole:].sum(dtype=torch.int64))


def _stamp(folder: Path) -> None:
    """Say that it is of use still, and remove those that none was for a month."""
    (folder / _STAMP).touch()
    for other in folder.parent.iterdir():
        with suppress(FileNotFoundError):  # another process may be sweeping, too
            if time.time() - (other / _STAMP).stat().st_mtime > _UNUSED_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
