"""Measure a merged folder, and write down what it is worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import qlora_kit
from qlora_kit.artifact.record import AdapterRef, BaseRef, MadeFrom, write_record
from qlora_kit.environment import Hardware
from qlora_kit.evaluate.divergence import Recorded, compare_to_recorded
from qlora_kit.export.card import PACKED_INTEGERS, write_card
from qlora_kit.export.choose import Candidate, why_beyond_budget
from qlora_kit.export.delta import WEIGHTS_FILE
from qlora_kit.export.ledger import Row
from qlora_kit.export.merge import MergeResult
from qlora_kit.export.reload import load_plain, measuring_dtype, reload_faults
from qlora_kit.export.trained import TrainedAdapter
from qlora_kit.extras import distributions
from qlora_kit.model.base import quantization_record
from qlora_kit.model.bits import quantized_bits
from qlora_kit.model.manifest import MANIFEST_FILE, lasting_name, read_manifest
from qlora_kit.model.source import ModelSource
from qlora_kit.records import file_sha256
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.runtime.forward import CausalScorer
from qlora_kit.versions import package_versions

CERTIFICATE_FILE = "certificate.json"
BATCH_SIZE = 64
_FORMAT = 1


def measure(
    result: MergeResult,
    trained: TrainedAdapter,
    recorded: Recorded,
    max_kl: float | None,
    hardware: Hardware,
    reporter: Reporter = SILENT,
) -> Candidate:
    """Load the folder as anybody would, and compare it with what the trained graph said."""
    is_float = result.dtype in ("float32", "float16", "bfloat16")
    stored = getattr(torch, result.dtype) if is_float else trained.compute_dtype
    dtype = measuring_dtype(stored, hardware)
    model, faults = load_plain(result.folder, dtype, hardware, trained.trust_remote_code)
    faults += reload_faults(model, result.folder, trained, result.tied)
    with reporter.progress(f"measuring ({result.base} base)", recorded.num_tokens) as progress:
        divergence = compare_to_recorded(
            CausalScorer(model, trained.tokenizer.pad_token_id, dtype),
            recorded,
            batch_size=BATCH_SIZE,
            progress=progress,
        )
    return Candidate(result, divergence, tuple(faults), max_kl)


def certify(
    chosen: Candidate,
    candidates: Sequence[Candidate],
    trained: TrainedAdapter,
    max_kl: float | None,
    recipe_sha256: str | None,
    home: Path,
    chain: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write the model card, certificate.json and artifact.json into the folder of `chosen`, which
    will be `home`; returns the certificate. `chain` are the ledger's rows before the merge.
    """
    folder = chosen.result.folder
    certificate: dict[str, Any] = {
        "format": _FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "qlora_kit_version": qlora_kit.__version__,
        "versions": {**package_versions(), **_tools(chosen)},
        "max_kl": max_kl,
        **chosen.as_dict(),
        "trained_on": trained_on(trained),
        "adapter_sha256": file_sha256(trained.folder / WEIGHTS_FILE),
        "recipe_sha256": recipe_sha256,
        "candidates": [one.as_dict() for one in candidates],
        "notes": why_beyond_budget(
            chosen, _num_8bit(trained), str(trained.compute_dtype).removeprefix("torch.")
        ),
    }
    if chain:
        certificate["ledger"] = [*chain, asdict(_row_of(chosen))]
    write_card(certificate, folder)
    text = json.dumps(certificate, indent=2, ensure_ascii=False)
    (folder / CERTIFICATE_FILE).write_text(text + "\n", encoding="utf-8")
    write_record(
        folder,
        kind="merged",
        made_from=origin_of(trained, recipe_sha256),
        settings={"base": chosen.result.base, "dtype": chosen.result.dtype},
        tools=_tools(chosen),
        home=home,
    )
    return certificate


def _tools(chosen: Candidate) -> dict[str, str | None]:
    packs = chosen.result.dtype in PACKED_INTEGERS
    return package_versions(distributions("qat")) if packs else {}


def _num_8bit(trained: TrainedAdapter) -> int:
    """Layers that training kept in 8 bits."""
    return list(quantized_bits(trained.skeleton, trained.quantization).values()).count(8)


def _row_of(chosen: Candidate) -> Row:
    result, divergence = chosen.result, chosen.divergence
    return Row(
        f"merged, {result.base} base in {result.dtype}",
        divergence.candidate_perplexity,
        divergence.kl_mean,
        divergence.top1_agreement,
        disk_bytes=result.num_bytes,
    )


def trained_on(trained: TrainedAdapter) -> dict[str, Any]:
    """What a certificate says of the base, and how it was trained on."""
    return {
        "name": public_name(trained.source),
        "kind": trained.source.kind,
        "revision": trained.source.revision,
        "fingerprint": _fingerprint(trained.folder),
        "quantization": quantization_record(trained.quantization, trained.compute_dtype),
        "quantization_aware": None if trained.aware is None else trained.aware.record(),
    }


def origin_of(trained: TrainedAdapter, recipe_sha256: str | None) -> MadeFrom:
    """What is made out of an adapter and its base comes from both."""
    base = BaseRef(
        lasting_name(trained.source),
        _fingerprint(trained.folder),
        trained.source.revision,
        trained.source.gguf_file,
    )
    weights = file_sha256(trained.folder / WEIGHTS_FILE)
    return MadeFrom(base, AdapterRef(str(trained.folder.absolute()), weights), recipe_sha256)


def public_name(source: ModelSource) -> str:
    """What the base is called elsewhere: no path of this machine is published."""
    return source.name if source.kind in ("hub", "demo") else Path(source.name).name


def _fingerprint(adapter_folder: Path) -> str | None:
    """Of the base, where the adapter has a manifest that names it."""
    if not (adapter_folder / MANIFEST_FILE).is_file():
        return None
    return read_manifest(adapter_folder).base_fingerprint
