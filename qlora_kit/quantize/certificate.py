"""What a quantized folder says of itself: how it was made, and how far it is from its source."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qlora_kit
from qlora_kit.quantize.card import write_card
from qlora_kit.quantize.methods import tools_of
from qlora_kit.records import file_sha256
from qlora_kit.versions import package_versions

if TYPE_CHECKING:
    from qlora_kit.evaluate.divergence import Divergence
    from qlora_kit.quantize.held_out import HeldOut
    from qlora_kit.quantize.method import Calibration, Made, MethodOptions, Source
    from qlora_kit.runtime.protocol import Footprint

CERTIFICATE_FILE = "certificate.json"
_FORMAT = 1


@dataclass(frozen=True)
class Compared:
    """The source and what was made of it, on the same tokens."""

    divergence: Divergence
    source: Footprint
    quantized: Footprint


def passes(compared: Compared, max_kl: float | None) -> bool:
    """Whether the budget is met; without one, whether the result says anything at all."""
    kl = compared.divergence.kl_mean
    return math.isfinite(kl) if max_kl is None else kl <= max_kl


def write_certificate(
    draft: Path,
    *,
    method: str,
    options: MethodOptions,
    source: Source,
    public_name: str,
    note: str,
    calibration: Calibration | None,
    held_out: HeldOut,
    made: Made,
    compared: Compared,
    max_kl: float | None,
) -> dict[str, Any]:
    """Write certificate.json and the model card into the draft; returns what the first says."""
    certificate: dict[str, Any] = {
        "format": _FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "qlora_kit_version": qlora_kit.__version__,
        "versions": {**package_versions(), **tools_of(method)},
        "method": method,
        "options": options.model_dump(mode="json"),
        "source": {
            "name": public_name,
            "hub_id": source.hub_id,
            "note": note,
            "fingerprint": source.fingerprint,
            "dtype": str(source.dtype).removeprefix("torch."),
        },
        "calibration": None
        if calibration is None
        else {
            "description": calibration.description,
            "num_tokens": calibration.num_tokens,
            "tokens_by_source": dict(calibration.tokens_by_source),
        },
        "held_out": held_out.description,
        "max_kl": max_kl,
        "passed": passes(compared, max_kl),
        "divergence": asdict(compared.divergence),
        "footprints": {
            "source": _footprint(compared.source),
            "quantized": _footprint(compared.quantized),
        },
        "findings": dict(made.findings),
        "notes": list(made.notes),
        "files": {
            path.name: file_sha256(path) for path in sorted(draft.iterdir()) if path.is_file()
        },
    }
    text = json.dumps(certificate, indent=2, ensure_ascii=False)
    (draft / CERTIFICATE_FILE).write_text(text + "\n", encoding="utf-8")
    write_card(certificate, options, draft)
    return certificate


def _footprint(footprint: Footprint) -> dict[str, Any]:
    return {
        "parameters": dict(footprint.parameters),
        "num_parameters": footprint.num_parameters,
        "memory_bytes": footprint.memory_bytes,
        "disk_bytes": footprint.disk_bytes,
    }
