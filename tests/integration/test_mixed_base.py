"""QLoRA on a base of 4, 8 and 16 bits, from the recipe to the certified model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_kit.checkpoint.drift import compare
from qlora_kit.errors import RecipeError
from qlora_kit.recipe import load_recipe

from .conftest import Call, write_recipe

MIXED = {"overrides": {"down_proj": 8, "layers.0.mlp.down_proj": 16, "layers.1.self_attn": 8}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    from qlora_kit.run import run_recipe

    folder = tmp_path_factory.mktemp("mixed")
    run_recipe(load_recipe(write_recipe(folder, tiny_llama, quantization=MIXED)))
    return folder / "run"


def test_the_whole_line(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["holds"] is True
    assert summary["training"]["last_loss"] < summary["training"]["first_loss"]
    certificate = summary["certificate"]
    assert certificate["base"] == "dequantized"
    # In evaluation LLM.int8() rounds activations as well, which the merged weights do not.
    assert certificate["divergence"]["kl_mean"] < 1e-4
    assert certificate["reload_faults"] == []
    card = (trained / "merged" / "README.md").read_text()
    assert "kept in 4 bits (nf4) but for `down_proj` in 8" in card
    manifest = json.loads((trained / "adapter" / "qlora_kit.json").read_text())
    assert manifest["quantization"]["overrides"] == MIXED["overrides"]


def test_verbs_open_it_again(trained: Path, call: Call, tmp_path: Path) -> None:
    evaluated = call("evaluate", str(trained), "--json")
    assert evaluated.code == 0, evaluated.err
    merged = call("merge", str(trained), "--out", str(tmp_path / "merged"), "--json")
    assert merged.code == 0, merged.err
    assert json.loads(merged.out)["passed"] is True
    finished = call("train", str(trained / "recipe.yaml"))
    assert "is finished" in finished.out


def test_a_budget_that_rounded_inputs_exceed_is_explained(
    trained: Path, call: Call, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    narrow = ("--base", "dequantized", "--max-kl", "1e-12")
    merged = call("merge", str(trained), "--out", str(out), *narrow)
    assert merged.code == 1
    (note,) = json.loads((out / "certificate.json").read_text())["notes"]
    assert "layers of the base are kept in 8 bits" in note
    assert "kept in 8 bits" in merged.err + merged.out
    assert note in (out / "README.md").read_text()


def test_another_mixture_is_another_run(trained: Path) -> None:
    begun = load_recipe(trained / "recipe.yaml")
    now = load_recipe(trained / "recipe.yaml", ["quantization.overrides.down_proj=16"])
    (change,) = compare(begun, now).breaking
    assert "quantization.overrides" in str(change)


def test_a_merge_quantized_again_needs_plain_transformers_alone(
    trained: Path, call: Call, tmp_path: Path
) -> None:
    """What was in 8 bits stays in 16: a mixture of 4 and 8 is known to this kit only."""
    out = tmp_path / "again"
    call("merge", str(trained), "--out", str(out), "--requantize", "nf4", "--max-kl", "100")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "bitsandbytes"
    assert settings["load_in_4bit"] is True
    assert "model.layers.1.mlp.down_proj" in settings["llm_int8_skip_modules"]


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"overrides": {"down_proj": 5}}, ["overrides.down_proj", "one of 4, 8, 16", "5"]),
        ({"overrides": {"*": 8}}, ["overrides.*", "every layer"]),
        ({"overrides": {"v_proj": 4}}, ["has 4 bits without it"]),
        ({"overrides": {"": 8}}, ["overrides"]),
        ({"overrides": ["v_proj"]}, ["overrides", "a mapping"]),
        ({"int8_threshold": 5.0}, ["int8_threshold", "not in 8 bits"]),
        (
            {"load_in_8bit": True, "double_quant": False, "overrides": {"v_proj": 16}},
            ["double_quant", "8-bit base"],
        ),
    ],
)
def test_faults_are_found_in_the_recipe(
    tmp_path: Path, quantization: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path, tmp_path, quantization=quantization))
    for word in words:
        assert word in str(caught.value)


def test_settings_have_effect_on_the_layers_that_overrides_name(tmp_path: Path) -> None:
    for quantization in (
        {"int8_threshold": 5.0, "overrides": {"v_proj": 8}},
        {"load_in_8bit": True, "double_quant": False, "overrides": {"v_proj": 4}},
        {"load_in_4bit": False, "quant_type": "fp4", "overrides": {"v_proj": 4}},
    ):
        recipe = load_recipe(write_recipe(tmp_path, tmp_path, quantization=quantization))
        read = recipe.quantization.model_dump()
        assert {name: read[name] for name in quantization} == quantization, "read, and not refused"


def test_a_pattern_that_matches_nothing_is_found_before_the_weights_are_read(
    tmp_path: Path, tiny_llama: Path, call: Call
) -> None:
    overrides = {"overrides": {"w_proj": 8}}
    said = call("train", str(write_recipe(tmp_path, tiny_llama, quantization=overrides)))
    assert said.code == 1
    assert "quantization.overrides: w_proj matches no linear layer" in said.err
