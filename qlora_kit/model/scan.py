"""One pass over a checkpoint's tensors: are they finite, and whose are they?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qlora_kit.environment import cache_dir
from qlora_kit.errors import ModelError

# A tensor is sampled at its two ends and its middle: enough to tell two models apart, and
# nothing to wait for.
_SAMPLE_ELEMENTS = 1024
_SCAN_VERSION = 1


@dataclass(frozen=True)
class WeightScan:
    """What one pass over the weights found."""

    fingerprint: str
    """SHA-256 over the name, shape, dtype and samples of every tensor; the same however the
    checkpoint is cut into shards."""
    non_finite: tuple[str, ...]
    """Tensors that hold NaN or infinity."""

    def require_finite(self) -> None:
        """Raises ModelError naming the tensors that are not finite."""
        if self.non_finite:
            shown = ", ".join(self.non_finite[:3])
            more = len(self.non_finite) - 3
            raise ModelError(
                f"{shown}{f' and {more} more' if more > 0 else ''}: holds NaN or infinity, which "
                "quantization would spread over its neighbours. The checkpoint is damaged; get it again."
            )


def weight_files(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """The checkpoint's files, in the order of their names.

    Raises:
        ModelError: there are none, or only ones that must not be read.
    """
    for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = folder / index_name
        if index.is_file() and (allow_pickle or "safetensors" in index_name):
            names = sorted(set(_weight_map(index).values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise ModelError(
                    f"{folder} lacks {missing[0]}, which its index names: the download is incomplete."
                )
            return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    found = sorted(folder.glob("*.safetensors"))
    found = [path for path in found if not path.name.startswith("adapter")]
    if found:
        return found
    pickles = sorted(folder.glob("*.bin"))
    if pickles and allow_pickle:
        return pickles
    if pickles:
        raise ModelError(
            f"{folder} holds its weights as pickles ({pickles[0].name}), which can run code when they "
            "are read. Convert them to safetensors, or set model.allow_pickle: true."
        )
    raise ModelError(f"{folder} holds no weights (no .safetensors file).")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{index} is not a safetensors index.") from None


def iterate_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint by name, one at a time.

    Raises:
        ModelError: a file is truncated or not what its name says.
    """
    for path in files:
        if path.suffix == ".bin":
            yield from torch.load(
                path, map_location="cpu", weights_only=True, mmap=True
            ).items()
            continue
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():
                    yield name, shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} cannot be read as safetensors ({error}); it is truncated or damaged. Get it again."
            ) from None


def scan_weights(folder: Path, allow_pickle: bool = False) -> WeightScan:
    """Scan a checkpoint, or take the result of an earlier scan of the same files.

    Raises:
        ModelError: weights are missing, truncated or damaged.
    """
    files = weight_files(folder, allow_pickle)
    remembered = _remembered_path(files)
    if remembered.is_file():
        values = json.loads(remembered.read_text())
        return WeightScan(values["fingerprint"], tuple(values["non_finite"]))
    scan = _scan(files)
    remembered.parent.mkdir(parents=True, exist_ok=True)
    scratch = remembered.with_suffix(f".{hash(files[0]) & 0xFFFF:x}")
    scratch.write_text(
        json.dumps(
            {"fingerprint": scan.fingerprint, "non_finite": list(scan.non_finite)}
        )
    )
    scratch.replace(remembered)
    return scan


def _remembered_path(files: list[Path]) -> Path:
    """Where the scan of exactly these files is kept: path, size and time of change decide."""
    identity = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
    ]
    digest = hashlib.sha256(json.dumps([_SCAN_VERSION, identity]).encode()).hexdigest()
    return cache_dir() / "scans" / f"{digest[:32]}.json"


def _scan(files: list[Path]) -> WeightScan:
    digests: dict[str, str] = {}
    non_finite = []
    for name, tensor in iterate_tensors(files):
        digests[name] = _sampled_digest(tensor)
        if (
            tensor.is_floating_point()
            and tensor.element_size() > 1
            and not _is_finite(tensor)
        ):
            non_finite.append(name)
    fingerprint = hashlib.sha256(
        json.dumps(digests, sort_keys=True).encode()
    ).hexdigest()
    return WeightScan(fingerprint, tuple(sorted(non_finite)))


def _is_finite(tensor: torch.Tensor) -> bool:
    """One sum instead of a mask as large as the tensor; a finite sum proves all are finite."""
    total = tensor.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def _sampled_digest(tensor: torch.Tensor) -> str:
    flat = tensor.reshape(-1)
    middle = flat.numel() // 2
    pieces = [
        flat[:_SAMPLE_ELEMENTS],
        flat[middle : middle + _SAMPLE_ELEMENTS],
        flat[-_SAMPLE_ELEMENTS:],
    ]
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    for piece in pieces:
        digest.update(piece.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
