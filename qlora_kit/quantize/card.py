"""The model card of a quantized folder, from its certificate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.artifact.card import (
    CARD_FILE,
    RECORDS,
    front_matter,
    how_to_load,
    options_in_words,
)

if TYPE_CHECKING:
    from qlora_kit.quantize.method import MethodOptions


def write_card(certificate: Mapping[str, Any], options: MethodOptions, folder: Path) -> None:
    files = sorted(path.name for path in folder.iterdir() if path.suffix == ".gguf")
    text = quantized_card(certificate, options, files[0] if files else "")
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def quantized_card(
    certificate: Mapping[str, Any], options: MethodOptions, gguf_file: str = ""
) -> str:
    """Markdown with the front matter that the hub reads."""
    method, source = certificate["method"], certificate["source"]
    family = method.partition(":")[0]
    return "\n".join(
        [
            front_matter(family, source["hub_id"], "quantized", [family]),
            f"# {source['name'].rpartition('/')[2]}, quantized by {method}\n",
            _how_made(certificate, options),
            "## What it is worth\n",
            _figures(certificate),
            "## How to load it\n",
            how_to_load(family, gguf_file),
            RECORDS,
        ]
    )


def _how_made(certificate: Mapping[str, Any], options: MethodOptions) -> str:
    source, calibration = certificate["source"], certificate["calibration"]
    text = f"Made from `{source['name']}` in {source['dtype']} by `qlora-kit quantize`."
    text += options_in_words(options)
    if calibration is not None:
        text += f" Calibrated on {calibration['description']}."
    return "\n".join([text, *(f"\n- {note}" for note in certificate["notes"])]) + "\n"


def _figures(certificate: Mapping[str, Any]) -> str:
    figures = certificate["divergence"]
    sizes = {name: one["disk_bytes"] / 1e6 for name, one in certificate["footprints"].items()}
    rows = [
        ("perplexity of its source", f"{figures['reference_perplexity']:.5g}"),
        ("perplexity of this one", f"{figures['candidate_perplexity']:.5g}"),
        ("mean KL divergence (nats per token)", f"{figures['kl_mean']:.3g}"),
        ("same most likely token", f"{figures['top1_agreement']:.2%}"),
        ("size of its source", f"{sizes['source']:,.1f} MB"),
        ("size of this one", f"{sizes['quantized']:,.1f} MB"),
    ]
    table = [f"| {name} | {value} |" for name, value in rows]
    lines = [
        f"Against the model that it was made from, on {figures['num_tokens']:,} tokens of "
        f"{certificate['held_out']}.\n",
        "| figure | value |",
        "|---|---|",
        *table,
    ]
    if not certificate["passed"] and certificate["max_kl"] is not None:
        lines.append(
            f"\nIt is **not within** the budget of {certificate['max_kl']:g} nats per token."
        )
    return "\n".join(lines) + "\n"
