"""What a dequantized folder says of itself: certificate.json and a README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qlora_kit
from qlora_kit.artifact.card import CARD_FILE, RECORDS, front_matter, how_to_load
from qlora_kit.versions import package_versions

if TYPE_CHECKING:
    from qlora_kit.evaluate.divergence import Divergence
    from qlora_kit.export.dequantize import DequantizeResult

_FORMAT = 1


def write_certificate(
    folder: Path, result: DequantizeResult, name: str, hub_id: str | None
) -> None:
    """Write both into the draft. name, hub_id: what the quantized model is called."""
    certificate: dict[str, Any] = {
        "format": _FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "qlora_kit_version": qlora_kit.__version__,
        "versions": package_versions(),
        "source": {"name": name, "hub_id": hub_id, "num_bits": result.num_bits},
        "dtype": result.dtype,
        "num_modules": result.num_modules,
        "max_kl": result.max_kl,
        "passed": result.passed,
        "divergence": None if result.divergence is None else asdict(result.divergence),
        "reload_faults": list(result.faults),
    }
    text = json.dumps(certificate, indent=2, ensure_ascii=False)
    (folder / "certificate.json").write_text(text + "\n", encoding="utf-8")
    card = _card(certificate, result.divergence)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _card(certificate: Mapping[str, Any], divergence: Divergence | None) -> str:
    source, dtype = certificate["source"], certificate["dtype"]
    lines = [
        front_matter("dense", source["hub_id"], "finetune", ["dequantized"]),
        f"# {source['name'].rpartition('/')[2]}, dequantized\n",
        f"The {certificate['num_modules']} weights of `{source['name']}` that were stored in "
        f"{source['num_bits']} bits are {dtype} here, by `qlora-kit dequantize`. It computes what "
        "the quantized model computes; what quantizing had lost is not back.\n",
    ]
    if divergence is not None:
        lines.append(
            f"Against the quantized model, on {divergence.num_tokens} random tokens: mean KL "
            f"{divergence.kl_mean:.3g} nats per token (budget {certificate['max_kl']:g}), same "
            f"most likely token {divergence.top1_agreement:.2%}.\n"
        )
    lines += [f"- does not come back on loading: {one}\n" for one in certificate["reload_faults"]]
    return "\n".join([*lines, "## How to load it\n", how_to_load("dense"), RECORDS])
