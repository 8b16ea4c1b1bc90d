"""Every recipe that ships: it loads, it passes preflight, and its header tells the truth."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qlora_kit.preflight import preflight
from qlora_kit.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[3]
# Launcher settings live beside the recipes and name no model.
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if re.search(r"^model:", path.read_text(), re.MULTILINE)
)
MODELS_PEOPLE_USE = {
    "gemma-3-12b",
    "llama-3.1-8b",
    "llama-3.3-70b",
    "mistral-7b",
    "qwen3-32b",
    "qwen3-8b",
    "smollm2-1.7b",
}


def header(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return lines[: next(number for number, line in enumerate(lines) if line[:1] != "#")]


def name(path: Path) -> str:
    return path.relative_to(ROOT / "recipes").with_suffix("").as_posix()


def memory_table() -> dict[str, list[float]]:
    text = (ROOT / "docs/memory.md").read_text().partition("# Figures in the recipes' headers")[2]
    rows = re.findall(r"^\| ([a-z][\w.-]+) \|(.*)\|$", text, re.M)
    return {
        recipe: [float(cell) for cell in cells.split("|")]
        for recipe, cells in rows
        if recipe != "recipe"
    }


def test_there_are_recipes() -> None:
    assert {name(path) for path in RECIPES} >= MODELS_PEOPLE_USE


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_it_passes_check(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path)
    assert preflight(recipe) == []
    assert recipe.data.eval, "a recipe shows how to hold rows out"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_it_opens_with_its_command_and_its_memory(path: Path) -> None:
    lines = header(path)
    assert re.fullmatch(
        rf"# (accelerate launch -m qlora_kit|qlora-kit) train recipes/{name(path)}\.yaml", lines[0]
    )
    assert re.search(r"[Mm]emory: .*\d+ Gi?B", " ".join(lines))


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_evaluation_needs_no_more_memory_than_training(path: Path) -> None:
    train = load_recipe(path).train
    if train.eval_strategy != "no":
        assert train.per_device_eval_batch_size <= train.per_device_train_batch_size


@pytest.mark.parametrize("recipe_name", sorted(memory_table()))
def test_the_memory_it_names_follows_from_the_table(recipe_name: str) -> None:
    path = ROOT / "recipes" / f"{recipe_name}.yaml"
    recipe = load_recipe(path)
    assert tokens_of(recipe) == memory_table()[recipe_name][7]
    total = total_gb(memory_table()[recipe_name][:8])
    assert round(total) == memory_table()[recipe_name][-1]
    assert f"about {total:.0f} GB on the GPU at full length" in " ".join(header(path))


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_for_a_gpu_is_in_the_table(path: Path) -> None:
    assert (name(path) in memory_table()) == ("GB on the GPU" in " ".join(header(path)))


def total_gb(sizes: list[float]) -> float:
    """The arithmetic of docs/memory.md."""
    quantized, other, adapter, layers, hidden, inner, vocabulary, tokens = sizes
    static = quantized * 4.127 / 8 + other * 2 + adapter * 10 / 1e3
    checkpoints = layers * hidden * 4 * tokens / 1e9
    loss = vocabulary * 14 * tokens / 1e9
    layer = 1.5 * (30 * hidden + 16 * inner) * tokens / 1e9
    return static + checkpoints + max(loss, layer) + 1.5


def tokens_of(recipe: Recipe) -> int:
    return recipe.train.per_device_train_batch_size * recipe.data.max_length


@pytest.mark.parametrize("recipe_name", ["gemma-3-4b", "gemma-3-12b"])
def test_gemmas_targets_are_the_language_model(recipe_name: str) -> None:
    """Every linear layer of the language model, and none of the vision tower."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3Config

    config = Gemma3Config(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "vocab_size": 300,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 14,
            "image_size": 28,
        },
        mm_tokens_per_image=4,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = load_recipe(ROOT / "recipes" / f"{recipe_name}.yaml").lora.target_modules
    assert isinstance(targets, str)
    matched = {module for module in linear if re.fullmatch(targets, module)}
    assert matched == {n for n in linear if "language_model.layers" in n}
    assert len(matched) == 2 * 7
