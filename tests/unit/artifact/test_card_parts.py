"""What cards have in common."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qlora_kit.artifact.card import front_matter, how_to_load, options_in_words
from qlora_kit.quantize.four_bit import FourBitOptions
from qlora_kit.quantize.gguf.make import GgufOptions


def test_a_base_is_named_where_the_hub_knows_it() -> None:
    front = yaml.safe_load(front_matter("nf4", "org/model", "quantized", ["nf4"]).split("---")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("org/model", "quantized")
    assert front["tags"] == ["nf4", "qlora-kit"]
    assert "base_model" not in front_matter("nf4", None, "quantized", ["nf4"])


def test_options_stand_as_they_are_written() -> None:
    options = FourBitOptions(block_size=32, double_quant=False, skip_modules=("q_proj",))
    told = options_in_words(options)
    assert "`block_size=32`, `double_quant=false`" in told
    assert "`skip_modules=[q_proj]`" in told


def test_neither_defaults_nor_paths_are_told() -> None:
    assert options_in_words(GgufOptions()) == ""
    assert options_in_words(GgufOptions(llama_cpp=Path("/home/me/llama.cpp"))) == ""


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("nf4", "With `transformers` and `bitsandbytes`"),
        ("gptq", "With `transformers` and `compressed-tensors`"),
        ("int8", "import qlora_kit.quantize.int8"),
        ("gguf", "llama-cli -m model-Q8_0.gguf"),
        ("onnx", "InferenceSession"),
        ("dense", "```python\nfrom transformers"),
    ],
)
def test_every_kind_says_how_it_is_loaded(family: str, words: str) -> None:
    assert words in how_to_load(family, "model-Q8_0.gguf")
