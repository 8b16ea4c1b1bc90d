"""The model card of a merged folder, from its certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_kit.artifact.card import CARD_FILE, RECORDS, front_matter, how_to_load
from qlora_kit.export.ledger import Row, markdown

PACKED_INTEGERS = ("int8", "int4-group")


def write_card(certificate: dict[str, Any], folder: Path) -> None:
    (folder / CARD_FILE).write_text(model_card(certificate), encoding="utf-8")


def model_card(certificate: dict[str, Any]) -> str:
    """Markdown with the front matter that the hub reads."""
    trained_on = certificate["trained_on"]
    name = trained_on["name"]
    return "\n".join(
        [
            front_matter("merged", hub_id(trained_on), "finetune", [*tags(trained_on), "merged"]),
            f"# {name.rpartition('/')[2]}, fine-tuned and merged\n",
            _how_made(certificate),
            "## What it is worth\n",
            _verdict(certificate),
            _figures(certificate),
            *_chain(certificate),
            "## How to load it\n",
            how_to_load(_format(certificate)),
            RECORDS,
        ]
    )


def _format(certificate: dict[str, Any]) -> str:
    """Integers of quantization-aware training are packed as compressed-tensors does."""
    dtype: str = certificate["dtype"]
    return "compressed-tensors" if dtype in PACKED_INTEGERS else dtype


def hub_id(trained_on: dict[str, Any]) -> str | None:
    """What the hub knows the base by; None where it is no model of the hub."""
    return trained_on["name"] if trained_on["kind"] == "hub" else None


def _how_made(certificate: dict[str, Any]) -> str:
    trained_on = certificate["trained_on"]
    base = {
        "dequantized": "the dequantized weights that it was trained on",
        "original": "the original weights, before quantization"
        if _fewest_bits(trained_on) < 16
        else "the weights that it was trained on",
    }[certificate["base"]]
    dtype = certificate["dtype"]
    aware = trained_on.get("quantization_aware")
    if dtype in ("float32", "float16", "bfloat16"):
        stored = f"rounded once, to {dtype}"
    elif aware is None:
        stored = f"quantized again, to {dtype}"
    else:
        stored = f"quantized to {dtype}, as it was at every step of the training"
    if is_full(trained_on):
        return f"{trained_from(trained_on)} They took the place of its own, {stored}.\n"
    return f"{trained_from(trained_on)} It was added in float32 to {base}. The sum was {stored}.\n"


def is_full(trained_on: dict[str, Any]) -> bool:
    """Whether the weights were trained themselves; a record of an earlier version does not say."""
    return (trained_on.get("quantization_aware") or {}).get("train") == "full"


def tags(trained_on: dict[str, Any]) -> list[str]:
    """Under which the hub finds it, by how it was trained."""
    return ["quantization-aware-training"] if is_full(trained_on) else ["qlora", "lora"]


def trained_from(trained_on: dict[str, Any]) -> str:
    """One sentence: what was trained, and the base in the form that it was trained on."""
    bits, overrides = _num_bits(trained_on), _overrides(trained_on)
    kept = f"kept in {bits} bits"
    kept += f" ({trained_on['quantization']['quant_type']})" if bits == 4 else ""
    if overrides:
        named = ", ".join(
            f"`{pattern}` in {width}" for pattern, width in list(overrides.items())[:5]
        )
        kept += f" but for {named}{' …' if len(overrides) > 5 else ''}"
    revision = f" at revision `{trained_on['revision']}`" if trained_on["revision"] else ""
    if is_full(trained_on):
        return (
            f"The weights of all linear layers but the head were trained, with the rest of "
            f"`{trained_on['name']}`{revision} as it was."
        )
    return f"A LoRA adapter was trained on `{trained_on['name']}`{revision}, {kept}."


def _num_bits(trained_on: dict[str, Any]) -> int:
    settings = trained_on["quantization"]
    return 4 if settings["load_in_4bit"] else 8 if settings["load_in_8bit"] else 16


def _overrides(trained_on: dict[str, Any]) -> dict[str, int]:
    """Of the quantization; a record of an earlier version has none."""
    return trained_on["quantization"].get("overrides") or {}


def _fewest_bits(trained_on: dict[str, Any]) -> int:
    return min([_num_bits(trained_on), *_overrides(trained_on).values()])


def ledger_section(rows: list[dict[str, Any]], num_tokens: int) -> str:
    """The chain from the base to what the card is of."""
    return (
        f"Each step, measured on {num_tokens:,} held-out tokens. KL is the mean divergence per "
        "token from the trained model (adapter on its base), in nats.\n\n"
        + markdown([Row(**row) for row in rows])
    )


def _verdict(certificate: dict[str, Any]) -> str:
    if certificate["max_kl"] is None:
        aware = certificate["trained_on"]["quantization_aware"]
        if aware is None:
            return (
                "It is made to be quantized, and has no budget of its own. The figures say how far "
                "it is from the model that was trained and evaluated, on "
                f"{certificate['divergence']['num_tokens']:,} held-out tokens.\n"
            )
        return (
            f"It was trained to be quantized to {aware['method']}, and is kept for that: what was "
            "trained and evaluated is the quantized model made from it. The figures say how far "
            "this one "
            f"is from that, on {certificate['divergence']['num_tokens']:,} held-out tokens.\n"
        )
    found = "within" if certificate["passed"] else "**not within**"
    lines = [
        f"Measured against {_graph(certificate)}the model that was trained and "
        f"evaluated, on {certificate['divergence']['num_tokens']:,} held-out tokens. It is {found} "
        f"the budget of {certificate['max_kl']:g} nats per token.\n"
    ]
    points = [f"does not come back on loading: {one}" for one in certificate["reload_faults"]]
    points += certificate["notes"]
    if points:
        lines.append("".join(f"- {point}\n" for point in points))
    return "\n".join(lines)


def _graph(certificate: dict[str, Any]) -> str:
    return "" if is_full(certificate["trained_on"]) else "the adapter on its base, which is "


def _figures(certificate: dict[str, Any]) -> str:
    figures = certificate["divergence"]
    rows = [
        ("mean KL divergence (nats per token)", f"{figures['kl_mean']:.3g}"),
        ("largest KL divergence of a token", f"{figures['kl_max']:.3g}"),
        ("same most likely token", f"{figures['top1_agreement']:.3%}"),
        ("largest change of a log-probability", f"{figures['max_abs_delta_logp']:.3g}"),
        ("perplexity of the trained model", f"{figures['reference_perplexity']:.5g}"),
        ("perplexity of this one", f"{figures['candidate_perplexity']:.5g}"),
    ]
    survival = certificate["survival"]
    if survival is not None:
        rows += [
            ("share of each update that is left, median", f"{survival['median']:.2%}"),
            (f"the same, least (`{survival['worst']}`)", f"{survival['min']:.2%}"),
        ]
    lines = ["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + "\n"


def _chain(certificate: dict[str, Any]) -> list[str]:
    if "ledger" not in certificate:
        return []
    return [ledger_section(certificate["ledger"], certificate["divergence"]["num_tokens"])]
