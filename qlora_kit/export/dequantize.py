"""A bitsandbytes checkpoint, 4- or 8-bit, as plain 16- or 32-bit safetensors."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM

from qlora_kit.artifact.record import BaseRef, made_from, write_record
from qlora_kit.atomic import draft_beside
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.environment import Hardware
from qlora_kit.errors import ModelError
from qlora_kit.evaluate.divergence import Divergence, compare_to_recorded, record_logprobs
from qlora_kit.export.checkpoint import Checkpoint
from qlora_kit.export.dense import (
    is_stored_quantized,
    iterate_dense,
    loaded_dtype,
    stored_dtype,
)
from qlora_kit.export.dequantized_card import write_certificate
from qlora_kit.export.merge import MAX_SHARD_BYTES, require_absent, round_to
from qlora_kit.export.names import NameMap, map_names
from qlora_kit.export.plan import DtypeName
from qlora_kit.export.reload import load_plain, measuring_dtype
from qlora_kit.export.shards import ShardWriter, require_room
from qlora_kit.export.surroundings import save_config
from qlora_kit.export.ties import resolve_ties
from qlora_kit.model import mixed_bits as mixed_bits  # a stored base may be of this kind
from qlora_kit.model.companions import copy_companions
from qlora_kit.model.prequantized import MIXED_METHOD, prequantized_settings, stored_bits
from qlora_kit.model.quantized import never_repacked
from qlora_kit.model.scan import scan_weights
from qlora_kit.model.skeleton import Skeleton, build_skeleton, load_config
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.runtime.forward import CausalScorer

# LLM.int8() rounds activations as well, which dense weights do not: its figures differ by that.
MAX_KL = {4: 1e-3, 8: 2e-2}

_NUM_SEQUENCES = 4
_SEQUENCE_TOKENS = 32
_BATCH_SIZE = 2


@dataclass(frozen=True)
class DequantizeResult:
    """A dense model on the disk, compared with the quantized one that it was."""

    folder: Path
    num_bits: int
    """What most of its quantized modules were stored in."""
    dtype: str
    num_modules: int
    """Weights that were quantized."""
    num_bytes: int
    divergence: Divergence | None
    """On random tokens, from the quantized model to the dense one; None where it was not asked."""
    faults: tuple[str, ...]
    """What does not come back when the folder is loaded."""
    max_kl: float
    seconds: float

    @property
    def passed(self) -> bool:
        near = self.divergence is None or self.divergence.kl_mean <= self.max_kl
        return near and not self.faults


def dequantize_checkpoint(
    folder: Path,
    out: Path,
    hardware: Hardware,
    *,
    dtype: DtypeName = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    compare: bool = True,
    public_name: str | None = None,
    hub_id: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    reporter: Reporter = SILENT,
) -> DequantizeResult:
    """Write `folder` into `out` with every weight dense; `out` appears whole or not at all.

    Dequantized in float32 and rounded once, a tensor at a time. `compare` loads both models, one
    after the other. `public_name` and `hub_id` are what the card calls the model; unless given, its
    folder's name, and nothing that the hub knows.

    Raises:
        ModelError: it is no bitsandbytes checkpoint, is damaged, or overflows the dtype.
        RunError: `out` exists. HardwareError: no room on the disk.
    """
    started = time.monotonic()
    require_absent(out)
    skeleton = build_skeleton(load_config(folder, trust_remote_code), trust_remote_code)
    bits = _require_bitsandbytes(folder, skeleton)
    num_bits, max_kl = _most(bits), max(MAX_KL[one] for one in bits.values())
    with Checkpoint(folder, allow_pickle) as checkpoint, draft_beside(out) as draft:
        names = _map_names(checkpoint, skeleton)
        num_modules = sum(is_stored_quantized(checkpoint, name) for name in names.parameters)
        rounded = stored_dtype(checkpoint, names) if dtype == "auto" else getattr(torch, dtype)
        require_room(out, _num_bytes(skeleton, rounded))
        dense = draft / "dense"
        dense.mkdir()
        writer = ShardWriter(dense, max_shard_bytes)
        num_tensors = len(names.parameters) + len(names.passed)
        with reporter.progress("dequantizing", num_tensors) as progress:
            for name, value in _tensors(checkpoint, names, skeleton, rounded):
                writer.add(name, value)
                progress.update()
        writer.close()
        copy_companions(folder, dense, trust_remote_code)
        save_config(skeleton.model.config, dense, dtype=rounded)
        divergence: Divergence | None = None
        faults: tuple[str, ...] = ()
        if compare:
            divergence, faults = _compare(
                folder, dense, draft, rounded, hardware, trust_remote_code, reporter
            )
        result = DequantizeResult(
            folder=out,
            num_bits=num_bits,
            dtype=str(rounded).removeprefix("torch."),
            num_modules=num_modules,
            num_bytes=writer.num_bytes,
            divergence=divergence,
            faults=faults,
            max_kl=max_kl,
            seconds=time.monotonic() - started,
        )
        write_certificate(dense, result, public_name or folder.name, hub_id)
        write_record(
            dense,
            kind="dequantized",
            made_from=made_from(folder, _as_base(folder, allow_pickle)),
            settings={"dtype": result.dtype, "num_bits": num_bits},
            home=out,
        )
        dense.rename(out)
    return result


def _as_base(folder: Path, allow_pickle: bool) -> BaseRef:
    return BaseRef(str(folder.resolve()), scan_weights(folder, allow_pickle).fingerprint)


def _require_bitsandbytes(folder: Path, skeleton: Skeleton) -> dict[str, int]:
    """Bits that its modules are stored in."""
    settings = prequantized_settings(skeleton)
    if settings is None:
        raise ModelError(
            f"{folder} is not quantized: its config.json has no quantization_config. There is "
            "nothing to do."
        )
    method = settings.get("quant_method")
    if method not in ("bitsandbytes", MIXED_METHOD):
        raise ModelError(
            f"{folder} is quantized with {method}; only bitsandbytes checkpoints are dequantized."
        )
    bits = stored_bits(skeleton, settings)
    if not bits:
        raise ModelError(f"{folder} calls itself quantized, but all its layers are left out.")
    return bits


def _most(bits: Mapping[str, int]) -> int:
    return Counter(bits.values()).most_common(1)[0][0]


def _map_names(checkpoint: Checkpoint, skeleton: Skeleton) -> NameMap:
    names = map_names(skeleton, checkpoint.names(), ())
    packed = [name for name in names.passed if is_stored_quantized(checkpoint, name)]
    if packed:
        raise ModelError(
            f"{checkpoint.folder}: {packed[0]} is stored quantized, and fused with others when it "
            "is loaded; it was saved by another version of transformers and cannot be read."
        )
    return names


def _tensors(
    checkpoint: Checkpoint, names: NameMap, skeleton: Skeleton, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names as in the checkpoint, values rounded once."""
    ties = resolve_ties(skeleton, checkpoint, names, None)
    for dense in iterate_dense(checkpoint, names, skeleton, None):
        if dense.parameter in ties.duplicates:
            continue
        kept = dtype
        if dense.parameter is not None:
            kept = loaded_dtype(skeleton, dense.parameter, dtype)
        yield dense.name, round_to(dense.value, kept, dense.name)


def _num_bytes(skeleton: Skeleton, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in skeleton.model.parameters()) * dtype.itemsize


def _load_quantized(folder: Path, hardware: Hardware, trust_remote_code: bool) -> Any:
    """The quantized model, computing in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map={"": hardware.device},
        trust_remote_code=trust_remote_code,
        local_files_only=True,
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
            module.compute_type_is_set = True
    never_repacked(model)
    return model.eval()


def _compare(
    folder: Path,
    dense: Path,
    scratch: Path,
    dtype: torch.dtype,
    hardware: Hardware,
    trust_remote_code: bool,
    reporter: Reporter,
) -> tuple[Divergence, tuple[str, ...]]:
    """Both models on random tokens, one after the other."""
    quantized = _load_quantized(folder, hardware, trust_remote_code)
    rows = _random_sequences(quantized.config.get_text_config().vocab_size)
    with reporter.progress("comparing", 2 * _NUM_SEQUENCES * (_SEQUENCE_TOKENS - 1)) as progress:
        options: dict[str, Any] = {"batch_size": _BATCH_SIZE, "progress": progress}
        recorded = record_logprobs(CausalScorer(quantized, 0), rows, scratch, **options)
        del quantized
        plain, faults = load_plain(
            dense, measuring_dtype(dtype, hardware), hardware, trust_remote_code
        )
        return compare_to_recorded(CausalScorer(plain, 0), recorded, **options), tuple(faults)


def _random_sequences(vocab_size: int) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(0)
    shape = (_NUM_SEQUENCES, _SEQUENCE_TOKENS)
    rows = torch.randint(0, vocab_size, shape, generator=generator).tolist()
    return [
        TokenSequence(tuple(ids), tuple(ids), f"random row {number}")
        for number, ids in enumerate(rows)
    ]
