"""What the model card tells a stranger."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from qlora_kit.export.card import model_card


def certificate(**values: Any) -> dict[str, Any]:
    return {
        "trained_on": {
            "name": "Qwen/Qwen3-8B",
            "kind": "hub",
            "revision": "abc123",
            "quantization": {"load_in_4bit": True, "load_in_8bit": False, "quant_type": "nf4"},
        },
        "base": "dequantized",
        "dtype": "bfloat16",
        "passed": True,
        "max_kl": 1e-3,
        "notes": [],
        "reload_faults": [],
        "divergence": {
            "kl_mean": 1.5e-5,
            "kl_max": 0.25,
            "top1_agreement": 0.999,
            "max_abs_delta_logp": 0.125,
            "reference_perplexity": 3.5,
            "candidate_perplexity": 3.75,
            "num_tokens": 4096,
        },
        "survival": {"min": 0.5, "median": 0.9, "worst": "layers.3.q_proj"},
        **values,
    }


def test_front_matter_and_figures() -> None:
    card = model_card(certificate())
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "Qwen/Qwen3-8B"
    assert "# Qwen3-8B, fine-tuned and merged" in card
    for words in (
        "`Qwen/Qwen3-8B` at revision `abc123`, kept in 4 bits (nf4)",
        "the dequantized weights that it was trained on",
        "rounded once, to bfloat16",
        "It is within the budget of 0.001",
        "| mean KL divergence (nats per token) | 1.5e-05 |",
        "| same most likely token | 99.900% |",
        "| the same, least (`layers.3.q_proj`) | 50.00% |",
    ):
        assert words in card


@pytest.mark.parametrize("kind", ["folder", "demo"])
def test_a_base_that_the_hub_does_not_have_is_only_named(kind: str) -> None:
    values = certificate()
    values["trained_on"] |= {"name": "smollm2", "kind": kind}
    card = model_card(values)
    front = yaml.safe_load(card.split("---")[1])
    assert not [key for key in front if key.startswith("base_model")]
    assert "`smollm2`" in card


@pytest.mark.parametrize("notes", [[], ["eight bits"], ["one", "two"]])
def test_paragraphs_are_one_blank_line_apart(notes: list[str]) -> None:
    card = model_card(certificate(notes=notes))
    assert "\n\n\n" not in card
    assert ("\n- " in card.partition("## What")[2]) == bool(notes)


def test_the_chain_is_a_table() -> None:
    rows = [
        {"name": "16-bit base", "note": "the base is stored quantized"},
        {"name": "trained", "perplexity": 3.5, "kl_mean": 0.0, "top1_agreement": 1.0},
    ]
    card = model_card(certificate(ledger=rows))
    assert "| 16-bit base (the base is stored quantized) | – | – | – | – | – |" in card
    assert "| trained | 3.5 | 0 | 100.00% | – | – |" in card
    assert "measured on 4096 held-out tokens" in card or "measured on 4,096 held-out tokens" in card
    assert "Each step" not in model_card(certificate())


def test_what_did_not_hold_is_said() -> None:
    card = model_card(
        certificate(passed=False, base="original", reload_faults=["the template is lost"])
    )
    assert "**not within** the budget" in card
    assert "- does not come back on loading: the template is lost" in card
    assert "the original weights, before quantization" in card


def test_what_was_quantized_again_does_not_claim_to_be_rounded() -> None:
    card = model_card(certificate(dtype="nf4", survival=None))
    assert "The sum was quantized again, to nf4." in card
    assert "share of each update" not in card
    assert "With `transformers` and `bitsandbytes`" in card


def test_integers_that_were_trained_for_are_no_int8_of_the_kit() -> None:
    card = model_card(certificate(dtype="int8", survival=None))
    assert "With `transformers` and `compressed-tensors`" in card
    assert "qlora_kit.quantize.int8" not in card
