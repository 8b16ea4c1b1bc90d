"""One pass over a checkpoint's tensors: are they finite, and whose are they?"""

from __future__ import annotations

import hashlib
import json
import pickle
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qlora_kit.environment import cache_dir
from qlora_kit.errors import ModelError
from qlora_kit.model.weights import weight_files
from qlora_kit.model.word_sum import word_sum

# What the fingerprint takes of a tensor besides the sum of all its words: its two ends and its
# middle, which tell apart what a sum cannot, the order.
_SAMPLE_ELEMENTS = 1024
# Large enough to keep the cost of a call small, small enough to stay in a processor's cache.
_BLOCK_ELEMENTS = 1 << 20
_SCAN_VERSION = 4

# Exponent and fraction, without the sign: (integer of the same width, mask, bits of infinity).
# Whatever is above or equal to infinity's bits is infinite or not a number (IEEE 754).
_MAGNITUDE_BITS = {
    torch.float64: (torch.int64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7FFF_FFFF, 0x7F80_0000),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
}


@dataclass(frozen=True)
class WeightScan:
    """What one pass over the weights found."""

    fingerprint: str
    """SHA-256 over the name, shape, dtype, samples and sum of every tensor: the same however the
    checkpoint is cut into shards, another one when any weight has changed. A copy in another
    dtype, or one that stores a tied head twice, counts as another checkpoint."""
    non_finite: tuple[str, ...]
    """Tensors that hold NaN or infinity."""

    def require_finite(self) -> None:
        """Raises ModelError naming the tensors that are not finite."""
        if self.non_finite:
            shown = ", ".join(self.non_finite[:3])
            more = len(self.non_finite) - 3
            raise ModelError(
                f"{shown}{f' and {more} more' if more > 0 else ''}: holds NaN or infinity, which "
                "quantization would spread over its neighbours. The checkpoint is damaged; get it "
                "again."
            )


def scan_weights(folder: Path, allow_pickle: bool = False, anew: bool = False) -> WeightScan:
    """Scan a checkpoint, or take the result of an earlier scan of the same files; not if `anew`.

    Raises:
        ModelError: weights are missing, truncated or damaged.
    """
    files = weight_files(folder, allow_pickle)
    kept_at = _kept_at(files)
    kept = None if anew else _read_kept(kept_at)
    if kept is not None:
        return kept
    scan = _scan(iterate_tensors(files))
    _keep(scan, kept_at)
    return scan


def iterate_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint by name, one at a time.

    Raises:
        ModelError: a file is truncated or not what its name says.
    """
    for path in files:
        if path.suffix == ".safetensors":
            yield from _safetensors(path)
        else:
            yield from _pickled(path).items()


def _safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        # Not mapped: all that was looked at would stay in memory while the file is open.
        with safe_open(path, framework="pt", backend="pread") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                yield name, shard.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read as safetensors ({error}); it is truncated or damaged. Get it "
            "again."
        ) from None


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        is_zip = zipfile.is_zipfile(
            path
        )  # what torch has written since 1.6; only that can be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path} cannot be read as PyTorch weights: {reason}") from None
    if not isinstance(state, dict):
        raise ModelError(f"{path} holds a {type(state).__name__} and no weights by name.")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _kept_at(files: Iterable[Path]) -> Path:
    """Where the scan of exactly these files is kept: their paths, sizes, places on the disk and
    times decide, of which that of the last change to what the file system knows of a file
    (st_ctime) cannot be set back, as archives and `cp -p` set the other.
    """
    identity = []
    for path in files:
        found = path.stat()
        times = (found.st_mtime_ns, found.st_ctime_ns)
        identity.append((str(path.resolve()), found.st_size, found.st_dev, found.st_ino, *times))
    digest = hashlib.sha256(json.dumps([_SCAN_VERSION, identity]).encode()).hexdigest()
    return cache_dir() / "scans" / f"{digest[:32]}.json"


def _read_kept(path: Path) -> WeightScan | None:
    """None where there is none, or where what is there is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return WeightScan(str(values["fingerprint"]), tuple(map(str, values["non_finite"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(scan: WeightScan, path: Path) -> None:
    """Written beside its place and renamed, so that no other process reads half of it.

    A cache that cannot be written to costs the next use a scan, and is no reason to stop.
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    try:
        scratch.write_text(json.dumps(asdict(scan)), encoding="utf-8")
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)


def _scan(tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightScan:
    digests: dict[str, str] = {}
    non_finite = []
    for name, tensor in tensors:
        flat = tensor.contiguous().reshape(-1)
        digests[name] = _digest(tuple(tensor.shape), flat)
        if not _is_finite(flat):
            non_finite.append(name)
    fingerprint = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    # Packed 4-bit numbers may be stored as floats, which mean nothing; their scales are checked.
    found = [name for name in non_finite if f"{name}.absmax" not in digests]
    return WeightScan(fingerprint, tuple(sorted(found)))


def _is_finite(flat: torch.Tensor) -> bool:
    """By the bits of each number, which is fifteen times as fast as torch.isfinite on a CPU."""
    if flat.dtype not in _MAGNITUDE_BITS or flat.numel() == 0:
        return True
    integer, mask, infinity = _MAGNITUDE_BITS[flat.dtype]
    bits = flat.view(integer)
    return all(int((block & mask).max()) < infinity for block in bits.split(_BLOCK_ELEMENTS))


def _digest(shape: tuple[int, ...], flat: torch.Tensor) -> str:
    middle = flat.numel() // 2
    pieces = [
        flat[:_SAMPLE_ELEMENTS],
        flat[middle : middle + _SAMPLE_ELEMENTS],
        flat[-_SAMPLE_ELEMENTS:],
    ]
    digest = hashlib.sha256(f"{flat.dtype}{shape}{word_sum(flat)}".encode())
    for piece in pieces:
        digest.update(piece.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
