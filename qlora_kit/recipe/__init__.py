"""Recipes: frozen specs, one file per section, read from YAML. Pure: no torch."""

from qlora_kit.recipe.data import DataSpec, SourceSpec
from qlora_kit.recipe.evaluate import EvaluateSpec, GenerateSpec
from qlora_kit.recipe.export import ExportSpec, MergeSpec
from qlora_kit.recipe.identity import recipe_hash
from qlora_kit.recipe.load import (
    load_recipe,
    load_whole_sections,
    load_written_out,
    recipe_from_dict,
    recipe_text,
    save_recipe,
)
from qlora_kit.recipe.lora import LoraSpec
from qlora_kit.recipe.model import ModelSpec
from qlora_kit.recipe.quantization import QuantizationSpec
from qlora_kit.recipe.quantization_aware import QuantizationAwareSpec
from qlora_kit.recipe.recipe import Recipe
from qlora_kit.recipe.train import TrainSpec

__all__ = [
    "DataSpec",
    "EvaluateSpec",
    "ExportSpec",
    "GenerateSpec",
    "LoraSpec",
    "MergeSpec",
    "ModelSpec",
    "QuantizationAwareSpec",
    "QuantizationSpec",
    "Recipe",
    "SourceSpec",
    "TrainSpec",
    "load_recipe",
    "load_whole_sections",
    "load_written_out",
    "recipe_from_dict",
    "recipe_hash",
    "recipe_text",
    "save_recipe",
]
