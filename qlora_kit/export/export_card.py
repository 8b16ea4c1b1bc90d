"""The model card of an export, from its certificate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.artifact.card import CARD_FILE, RECORDS, front_matter, how_to_load, options_in_words
from qlora_kit.export.card import hub_id, is_full, ledger_section, tags, trained_from

if TYPE_CHECKING:
    from qlora_kit.quantize.method import MethodOptions


def write_export_card(
    certificate: dict[str, Any], options: MethodOptions | None, folder: Path
) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".gguf")
    text = export_card(certificate, options, names)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def export_card(
    certificate: dict[str, Any], options: MethodOptions | None, gguf_files: list[str]
) -> str:
    """Markdown with the front matter that the hub reads."""
    target, trained_on = certificate["target"], certificate["trained_on"]
    name = trained_on["name"]
    family = target.partition(":")[0]
    relation = "adapter" if family == "adapter" else "quantized"
    return "\n".join(
        [
            front_matter(family, hub_id(trained_on), relation, [*tags(trained_on), family]),
            f"# {name.rpartition('/')[2]}, fine-tuned, as {target}\n",
            _how_made(certificate, options),
            "## What it is worth\n",
            ledger_section(certificate["ledger"], certificate["num_tokens"]),
            _parity(certificate["parity"]),
            "## How to load it\n",
            loading(certificate, gguf_files),
            RECORDS,
        ]
    )


def _how_made(certificate: dict[str, Any], options: MethodOptions | None) -> str:
    target, base = certificate["target"], certificate["base"]
    text = trained_from(certificate["trained_on"])
    if base is not None and not target.startswith("lora-gguf"):
        whose = "original" if base == "original" else "dequantized"
        text += (
            f" They were merged, and exported to {target}."
            if is_full(certificate["trained_on"])
            else f" It was merged into the {whose} weights, and the sum was exported to {target}."
        )
    elif target.startswith("lora-gguf"):
        whose = "as it was stored" if base == "original" else "as training saw it, dequantized"
        text += f" It stands here as GGUF beside its base, {whose}."
    other = certificate.get("not_kept")
    if other is not None:
        text += (
            " The merge into the other weights was tried as well, and is further off on held-out "
            f"rows: perplexity {other['perplexity']:.4g}, KL {other['kl_mean']:.2g}."
        )
    calibration = certificate["calibration"]
    if calibration is not None:
        text += f" Calibrated on {calibration['source']}."
    return text + ("" if options is None else options_in_words(options)) + "\n"


def _parity(parity: dict[str, Any]) -> str:
    composed = ", given to llama.cpp composed (Unicode NFC), which it does not do by itself"
    return (
        f"Template and tokenizer: {parity['num_conversations']} conversations and "
        f"{parity['num_texts']} texts ({parity['num_tokens']:,} tokens) give the same token ids as "
        f"in training{composed if parity['composed'] else ''}.\n"
    )


def loading(certificate: dict[str, Any], gguf_files: list[str]) -> str:
    """Commands that load it, for what it is."""
    target, name = certificate["target"], certificate["trained_on"]["name"]
    family = target.partition(":")[0]
    models = [one for one in gguf_files if not one.startswith("adapter")]
    if family == "lora-gguf":
        return f"```bash\nllama-cli -m {models[0]} --lora adapter.gguf -cnv\n```\n"
    if family == "ollama":
        return "```bash\nollama create my-model -f Modelfile && ollama run my-model\n```\n"
    if target == "adapter:vllm":
        rank = certificate["settings"]["max_lora_rank"]
        return (
            f"```bash\nvllm serve {name} --enable-lora --max-lora-rank {rank} "
            "--lora-modules tuned=path/to/this/folder\n```\n"
        )
    if family == "adapter":
        return "```bash\nqlora-kit chat path/to/this/folder\n```\n"
    return how_to_load(family, models[0] if models else "")
