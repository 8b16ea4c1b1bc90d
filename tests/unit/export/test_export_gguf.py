"""A run as GGUF, as LoRA beside its base, and for Ollama: each answers as what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig

from qlora_kit.artifact.verify import verify
from qlora_kit.environment import probe_hardware
from qlora_kit.export.export import export_reopened
from qlora_kit.export.jobs import ExportRequest
from qlora_kit.export.places import places_of
from qlora_kit.export.reopen import reopen_adapter
from qlora_kit.export.targets import parse_target
from qlora_kit.model.demo import demo_model_folder

from .tiny_runs import save_model
from .whole_runs import Heard, TinyRun, make_run

pytestmark = [pytest.mark.demo, pytest.mark.slow]  # llama.cpp's scripts start nine times


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, dict[str, Any], Heard]:
    """A small model whose tokenizer llama.cpp knows."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    save_model(folder / "base", config)
    tokenizer.save_pretrained(folder / "base")
    tiny, heard, hardware = make_run(folder), Heard(), probe_hardware()
    names = ("gguf:F32", "lora-gguf:F32", "ollama")
    made = export_reopened(
        reopen_adapter(tiny.run.folder, hardware),
        ExportRequest(tuple(map(parse_target, names))),
        places_of(tiny.run.folder),
        hardware,
        heard,
    )
    return tiny, {one["target"]: one for one in made}, heard


def kl_of(certificate: dict[str, Any], name: str) -> float:
    (row,) = (row for row in certificate["ledger"] if row["name"] == name)
    return float(row["kl_mean"])


Exported = tuple[TinyRun, dict[str, Any], Heard]


def test_in_float32_the_file_is_its_merge(exported: Exported) -> None:
    certificate = exported[1]["gguf:F32"]
    assert certificate["base"] == "dequantized"
    assert kl_of(certificate, "gguf:F32") < 1e-6
    assert certificate["parity"]["num_conversations"] > 5
    assert certificate["versions"]["llama-cpp-python"]
    card = (exported[0].run.exports / "gguf-F32" / "README.md").read_text()
    assert not any(word in card for word in ("None", "True", "importance")), "nothing was set"


def test_beside_the_base_as_training_saw_it_it_is_what_was_trained(exported: Exported) -> None:
    tiny, certificates, _ = exported
    certificate = certificates["lora-gguf:F32"]
    assert certificate["base"] == "dequantized"
    assert kl_of(certificate, "lora-gguf:F32") < 1e-6 < kl_of(certificate, "16-bit base")
    assert (tiny.run.exports / "lora-gguf-F32" / "adapter.gguf").is_file()
    assert "--lora adapter.gguf" in (tiny.run.exports / "lora-gguf-F32" / "README.md").read_text()


def test_ollama_is_given_the_template(exported: Exported) -> None:
    tiny, certificates, _ = exported
    folder = tiny.run.exports / "ollama-Q8_0"
    modelfile = (folder / "Modelfile").read_text()
    assert "FROM ./model-Q8_0.gguf" in modelfile
    assert "<|im_start|>" in modelfile
    assert kl_of(certificates["ollama:Q8_0"], "ollama:Q8_0") < 1e-2


def test_all_of_it_is_verified(exported: Exported) -> None:
    found = verify(exported[0].run.folder)
    assert found.holds, [link for link in found.links if not link.holds]
    assert {link.kind for link in found.links} >= {"gguf:F32", "lora-gguf:F32", "ollama:Q8_0"}
    assert isinstance(exported[0].run.folder, Path)
