"""`gguf:TYPE`: types, what is refused before the work, what is written, and what is said of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import build_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qlora_kit import extras
from qlora_kit.errors import HardwareError, ModelError
from qlora_kit.quantize.gguf import scripts
from qlora_kit.quantize.gguf.convert import open_converter, splitting_rule
from qlora_kit.quantize.gguf.make import checked_converter, dequantized_warning, fallback_note
from qlora_kit.quantize.gguf.quantizer import quantize_file
from qlora_kit.quantize.gguf.scripts import LlamaCpp, find_llama_cpp
from qlora_kit.quantize.gguf.types import gguf_type, gguf_types
from qlora_kit.quantize.methods import resolve_method
from qlora_kit.runtime import llama_library
from qlora_kit.runtime.gguf_header import read_header

if TYPE_CHECKING:
    from conftest import GgufFiles


def test_types_are_those_of_llama_cpp() -> None:
    types = gguf_types()
    assert {"F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q2_K"} <= set(types)
    assert (types["Q4_K_M"].number, types["Q8_0"].number, types["F16"].number) == (15, 7, 1)
    assert gguf_type("q4_k_m") == types["Q4_K_M"]
    assert [name for name in ("Q8_0", "Q6_K", "Q5_K_M") if types[name].has_few_bits] == []
    assert all(types[name].has_few_bits for name in ("Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_S", "Q2_K"))


def test_types_that_there_are_stand_in_the_order_of_their_bits() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, which says the types, is no must")
    with pytest.raises(ModelError) as caught:
        gguf_type("Z9")
    said = str(caught.value)
    assert said.startswith("there is no GGUF type Z9; there are IQ1_M, ")
    assert said.endswith(", BF16, F16, F32.")
    assert said.index(" Q2_K,") < said.index(" IQ3_M,") < said.index(" Q4_K_M,")
    with pytest.raises(ModelError, match=r"did you mean Q4_K_M\? There are IQ1_M, "):
        gguf_type("Q4KM")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Q4_KM", "did you mean Q4_K"),
        ("nonsense", "there is no GGUF type nonsense"),
        ("TQ1_0", "would destroy"),
    ],
)
def test_an_unknown_type_is_refused_by_its_name(name: str, said: str) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, which says the types, is no must")
    with pytest.raises(ModelError, match=said):
        resolve_method(f"gguf:{name}")


def test_without_the_extra_the_command_to_install_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever a checkout brings: the types are llama-cpp-python's, and so is what compares."""
    monkeypatch.setitem(extras.EXTRAS, "gguf", ("no_such_module_here",))
    for name in ("gguf:Q4_K_M", "gguf:Q8_0"):
        with pytest.raises(HardwareError, match=r"pip install 'qlora-kit\[gguf\]'"):
            resolve_method(name)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    llama_library.library.cache_clear()
    with pytest.raises(ModelError, match=r"pip install 'qlora-kit\[gguf\]'"):
        llama_library.library()


def test_the_process_that_quantizes_loads_no_torch() -> None:
    """Ten seconds of every quantization otherwise."""
    look = "import sys, qlora_kit.quantize.gguf.quantizer as it, qlora_kit.quantize.gguf."
    look += "importance_file; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_checkout_has_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no folder .*; llama_cpp=PATH names a checkout"):
        find_llama_cpp(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"lacks llama\.cpp's convert_hf_to_gguf\.py"):
        find_llama_cpp(tmp_path)
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (tmp_path / name).touch()
    for name in ("conversion", "gguf-py", "build/bin"):
        (tmp_path / name).mkdir(parents=True)
    assert find_llama_cpp(tmp_path).quantizer is None
    (tmp_path / "build/bin/llama-quantize").touch()
    assert find_llama_cpp(tmp_path).quantizer == tmp_path / "build/bin/llama-quantize"


def test_scripts_that_cannot_be_fetched_are_not_the_only_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path))
    monkeypatch.setattr(scripts, "source_commands", lambda *_: [])
    with pytest.raises(ModelError, match=r"(?s)could not be fetched.* with llama_cpp=PATH\."):
        find_llama_cpp()


def test_an_architecture_that_llama_cpp_does_not_know(
    loud_llama: Path, llama_scripts: LlamaCpp, tmp_path: Path
) -> None:
    folder = tmp_path / "unheard"
    shutil.copytree(loud_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["UnheardOfForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(loud_llama)
    with pytest.raises(ModelError, match="does not know the architecture UnheardOfForCausalLM"):
        open_converter(llama_scripts, folder, tokenizer, tmp_path / "vocabulary.gguf")
    assert not (tmp_path / "vocabulary.gguf").exists()


def test_a_vocabulary_of_its_own_is_taken_by_how_it_splits(loud_llama: Path) -> None:
    rule = splitting_rule(AutoTokenizer.from_pretrained(loud_llama))
    assert rule is not None
    assert "gpt" in rule


def test_the_rule_is_that_of_the_tokenizer_as_it_is_loaded(
    llama_scripts: LlamaCpp, tmp_path: Path
) -> None:
    """tokenizer.json splits as GPT-2's does here, and transformers makes a Qwen2's of it."""
    build_tokenizer(tmp_path)
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).save_pretrained(tmp_path)
    converter = checked_converter(llama_scripts, tmp_path, AutoTokenizer.from_pretrained(tmp_path))
    assert converter.rule == "qwen2"


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text"])
def test_what_the_converter_stumbles_over(
    kind: str, llama_scripts: LlamaCpp, tmp_path: Path
) -> None:
    """transformers writes no n_ctx for GPT-2; Gemma 3 has rows beyond its tokenizer's."""
    folder = tmp_path / "model"
    build_tokenizer(folder)
    sizes = {"vocab_size": 384, "hidden_size": 64, "num_attention_heads": 4}
    depth = {"n_layer": 1} if kind == "gpt2" else {"num_hidden_layers": 1, "head_dim": 16}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes, **depth, **ends)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    before = (folder / "config.json").read_bytes()
    target = tmp_path / "model.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    open_converter(llama_scripts, folder, tokenizer, target).convert(target, "f16")
    assert (folder / "config.json").read_bytes() == before
    loaded = llama_library.LoadedModel(target)
    loaded.close()


def test_a_file_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelError, match=r"cannot load .*: .*failed to load model"):
        llama_library.LoadedModel(tmp_path / "broken.gguf")


def test_what_is_written_and_what_is_said_of_it(made_gguf: GgufFiles, loud_llama: Path) -> None:
    folder, made = made_gguf["Q8_0"]
    assert made.open == "model-Q8_0.gguf"
    names = {path.name for path in folder.iterdir()}
    assert {"model-Q8_0.gguf", "tokenizer.json", "generation_config.json"} <= names
    assert [name for name in names if "between" in name or name.endswith(".safetensors")] == []
    assert made.findings["type"] == "Q8_0"
    assert made.findings["architecture"] == "llama"
    assert made.findings["llama_cpp"] == "llama-cpp-python==0.3.36"
    assert 8.5 <= made.findings["bits_per_weight"] < 8.6
    header = read_header(folder / made.open)
    stored = json.loads((loud_llama / "config.json").read_text())
    assert header.metadata["llama.block_count"] == stored["num_hidden_layers"]


def test_rows_that_fit_no_block_take_a_neighbouring_type(
    made_gguf: GgufFiles, llama_scripts: LlamaCpp, tmp_path: Path
) -> None:
    folder, made = made_gguf["F16"]
    kind = gguf_type("Q4_K_M")
    target = tmp_path / "model.gguf"
    plain = LlamaCpp(llama_scripts.folder, llama_scripts.origin)
    fallbacks = quantize_file(plain, folder / made.open, target, kind, 1)
    assert fallbacks is not None
    assert 0 < fallbacks[0] < fallbacks[1]
    assert f"{fallbacks[0]} of {fallbacks[1]} tensors" in fallback_note(fallbacks, kind)
    counts = read_header(target).parameters
    assert sum(counts.values()) == sum(read_header(folder / made.open).parameters.values())
    assert "F16" not in counts
    assert {"Q4_K", "Q6_K"} & set(counts), "rows of 256 take the type that was asked for"


@pytest.mark.slow
def test_the_quantizer_says_why_it_cannot(tmp_path: Path, llama_scripts: LlamaCpp) -> None:
    source = tmp_path / "no.gguf"
    source.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"cannot quantize no\.gguf to Q4_0"):
        quantize_file(llama_scripts, source, tmp_path / "out.gguf", gguf_type("Q4_0"), 1)


def test_rounding_twice_to_few_bits_is_warned_of(tmp_path: Path) -> None:
    assert dequantized_warning(tmp_path, gguf_type("Q4_K_M")) is None
    certificate = {"base": "dequantized", "trained_on": {"quantization": {"load_in_4bit": True}}}
    (tmp_path / "certificate.json").write_text(json.dumps(certificate))
    assert "a second time" in (dequantized_warning(tmp_path, gguf_type("Q4_K_M")) or "")
    assert dequantized_warning(tmp_path, gguf_type("Q8_0")) is None
    (tmp_path / "certificate.json").write_text(json.dumps({**certificate, "base": "original"}))
    assert dequantized_warning(tmp_path, gguf_type("Q4_K_M")) is None
