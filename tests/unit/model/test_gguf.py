"""GGUF conversion, against tiny Llama models written into GGUF files here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_kit.model.gguf as gguf_module
from qlora_kit.errors import HardwareError, ModelError
from qlora_kit.model.gguf import convert_cached, gguf_to_folder
from qlora_kit.records import file_sha256

from .tiny_gguf import TEMPLATE, Change, Tensors, tiny_llama, write_gguf


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 45)[None]).logits


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama())


@pytest.fixture(scope="module")
def tiny_folder(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_to_folder(tiny_gguf, tmp_path_factory.mktemp("folder") / "tiny")


@pytest.mark.parametrize("tied", [True, False])
def test_a_float32_file_gives_back_the_very_model(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied)
    path = write_gguf(tmp_path / "tiny.gguf", model)
    folder = gguf_to_folder(path, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert reloaded.dtype == torch.float32
    assert torch.equal(logits(reloaded), logits(model))
    shared = reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert (shared, reloaded.config.tie_word_embeddings) == (tied, tied)


def test_nothing_is_written_beside(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers' bar, which the first run on the demo model would show."""
    gguf_to_folder(write_gguf(tmp_path / "tiny.gguf", tiny_llama()), tmp_path / "out")
    assert "Converting" not in capfd.readouterr().err


def test_quantized_blocks_become_what_they_mean(tmp_path: Path) -> None:
    model, kind = tiny_llama(), gguf.GGMLQuantizationType.Q8_0
    folder = gguf_to_folder(
        write_gguf(tmp_path / "q8.gguf", model, kind=kind), tmp_path / "out", dtype="float32"
    )
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        original = model.state_dict()[name].numpy()
        meant = gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind)
        assert np.array_equal(reloaded.state_dict()[name].numpy(), meant)
        assert not np.array_equal(original, meant)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")],
)
def test_the_dtype_loses_nothing_worth_keeping(tmp_path: Path, kind: str, dtype: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), kind=gguf.GGMLQuantizationType[kind])
    folder = gguf_to_folder(path, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert json.loads((folder / "conversion.json").read_text())["dtype"] == dtype


def test_the_folder_carries_the_right_tokenizer(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("  12<|im_end|>").input_ids) == [
        "ĠĠ",
        "1",
        "2",
        "<|im_end|>",
    ]
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 128
    config = json.loads((tiny_folder / "config.json").read_text())
    generation = json.loads((tiny_folder / "generation_config.json").read_text())
    for ids in (config, generation):
        assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 0)


def test_every_token_that_ends_a_turn_ends_generation(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny_llama(), change=lambda writer, _: writer.add_eot_token_id(7)
    )
    folder = gguf_to_folder(path, tmp_path / "out")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


def test_stretched_positions_come_back(tmp_path: Path) -> None:
    stretched = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_llama(rope_parameters=stretched)
    plain = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    divisors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq

    def add_divisors(_: gguf.GGUFWriter, tensors: Tensors) -> None:
        tensors["rope_freqs.weight"] = divisors.numpy()

    path = write_gguf(tmp_path / "tiny.gguf", model, change=add_divisors)
    reloaded = AutoModelForCausalLM.from_pretrained(gguf_to_folder(path, tmp_path / "out"))
    assert reloaded.config.rope_parameters == stretched
    assert torch.equal(logits(reloaded), logits(model))
    assert not torch.equal(logits(model), logits(plain))


def test_a_second_use_takes_the_folder_as_it_is(
    tiny_folder: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(gguf_module, "_load", fail)
    assert gguf_to_folder(tiny_gguf, tiny_folder) == tiny_folder


def test_a_folder_of_something_else_is_left_alone(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ModelError, match="no converted model"):
        gguf_to_folder(tiny_gguf, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_of_two_conversions_at_once_the_first_wins(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, load = tmp_path / "out", gguf_module._load

    def load_while_another_finishes(*arguments: Any) -> Any:
        monkeypatch.setattr(gguf_module, "_load", load)
        gguf_to_folder(tiny_gguf, folder)
        (folder / "winner").touch()
        return load(*arguments)

    monkeypatch.setattr(gguf_module, "_load", load_while_another_finishes)
    assert gguf_to_folder(tiny_gguf, folder) == folder
    assert (folder / "winner").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_cache_goes_by_content(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    path = Path(shutil.copy(tiny_gguf, tmp_path / "model.gguf"))
    first = convert_cached(path)
    assert first.parent == tmp_path / "cache" / "gguf"
    assert first.name.startswith(f"{file_sha256(path)[:16]}-model-")
    assert convert_cached(path) == first
    write_gguf(path, tiny_llama(tied=False))
    assert convert_cached(path) != first


def test_files_beside_the_gguf_change_nothing(tiny_gguf: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_gguf, tmp_path / "model.gguf"))
    for name in ("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("another")
    folder = gguf_to_folder(path, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


def test_what_is_unsure_is_said_at_every_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def other_rule(writer: gguf.GGUFWriter, _: Tensors) -> None:
        del writer.kv_data[0]["tokenizer.ggml.pre"]
        writer.add_tokenizer_pre("brand-new")

    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), change=other_rule)
    for _ in range(2):
        caplog.clear()
        gguf_to_folder(path, tmp_path / "out")
        assert "'brand-new' is not known here" in caplog.text


def assert_refused(path: Path, parent: Path, match: str) -> None:
    parent.mkdir(exist_ok=True)
    with pytest.raises(ModelError, match=match):
        gguf_to_folder(path, parent / "out")
    assert list(parent.iterdir()) == []


def test_no_file_and_no_gguf(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.gguf", tmp_path / "to", "no GGUF file at")
    (tmp_path / "page.gguf").write_text("<html>not found</html>")
    assert_refused(tmp_path / "page.gguf", tmp_path / "to", "not a GGUF file: it starts with")
    (tmp_path / "empty.gguf").touch()
    assert_refused(tmp_path / "empty.gguf", tmp_path / "to", "not a GGUF file: it starts with")


@pytest.mark.parametrize("num_bytes", [4, 20, 24, 100, 2000, 5000, 20000, -5000, -1])
def test_a_truncated_file(tiny_gguf: Path, tmp_path: Path, num_bytes: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:num_bytes])
    assert_refused(tmp_path / "cut.gguf", tmp_path / "to", "truncated or damaged")


def test_an_architecture_that_transformers_does_not_know(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "new.gguf", tiny_llama(), architecture="rwkv7")
    assert_refused(path, tmp_path / "to", "cannot load new.gguf .*'rwkv7'")


def drop_a_tensor(_: gguf.GGUFWriter, tensors: Tensors) -> None:
    del tensors["blk.1.ffn_up.weight"]


def add_a_bias(_: gguf.GGUFWriter, tensors: Tensors) -> None:
    tensors["blk.0.attn_q.bias"] = np.ones(64, np.float32)


def spoil_a_weight(_: gguf.GGUFWriter, tensors: Tensors) -> None:
    tensors["blk.0.ffn_gate.weight"][3, 5] = np.nan


def state_another_width(writer: gguf.GGUFWriter, _: Tensors) -> None:
    writer.kv_data[0]["llama.feed_forward_length"].value = 80


@pytest.mark.parametrize(
    ("change", "match"),
    [
        # The newest transformers refuses this before we do, and keeps the shapes to itself.
        (
            state_another_width,
            r"shape \(96, 64\), but .* it would be \(80, 64\)|ignore_mismatched_sizes",
        ),
        (drop_a_tensor, r"lacks 1 tensors .*layers\.1\.mlp\.up_proj\.weight"),
        (add_a_bias, "would drop the rest"),
        (spoil_a_weight, r"layers\.0\.mlp\.gate_proj\.weight that are not finite"),
        (lambda writer, _: writer.add_type("adapter"), "holds a GGUF adapter"),
        (lambda writer, _: writer.add_uint16("split.count", 3), "one of 3 parts"),
        (lambda writer, _: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "longrope"),
    ],
)
def test_what_would_load_as_another_model(tmp_path: Path, change: Change, match: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), change=change)
    assert_refused(path, tmp_path / "to", match)


def test_a_full_disk(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1234))
    with pytest.raises(HardwareError, match=r"in float32: [\d,]+ bytes needed, 1,234 free"):
        gguf_to_folder(tiny_gguf, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SimpleNamespace(host_memory_bytes=1234)
    monkeypatch.setattr(gguf_module, "probe_hardware", lambda: small)
    with pytest.raises(HardwareError, match=r"bytes of memory, and this machine has 1,234"):
        gguf_to_folder(tiny_gguf, tmp_path / "out")
