"""An adapter on disk: it comes back to the same numbers, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_llama
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qlora_kit.errors import AdapterError
from qlora_kit.model import saved as saved_module
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.base import Base
from qlora_kit.model.manifest import MANIFEST_FILE, read_manifest, write_manifest
from qlora_kit.model.saved import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_adapter,
    save_adapter,
    write_adapter,
    write_tokenizer,
)
from qlora_kit.recipe import LoraSpec, QuantizationSpec
from qlora_kit.records import file_sha256

from .zoo import load, logits, shake, some_ids

NF4 = QuantizationSpec()
EIGHT = QuantizationSpec(load_in_8bit=True)
SIXTEEN = QuantizationSpec(load_in_4bit=False)


@dataclass(frozen=True)
class Tuned:
    """An adapter that says something, in memory and on disk."""

    base: Base
    model: PeftModel
    folder: Path
    logits: torch.Tensor


def tune(
    model: Path, folder: Path, lora: LoraSpec | None = None, quantization: QuantizationSpec = NF4
) -> Tuned:
    lora = lora or LoraSpec(r=4)
    base = load(model, quantization, lora=lora)
    adapted = attach_adapter(base, lora, 0).model
    shake(adapted)
    save_adapter(adapted, base, quantization, "0" * 64, folder)
    return Tuned(base, adapted, folder, logits(adapted, ids_of(base)))


def ids_of(base: Base) -> torch.Tensor:
    """Some ids, the last of which are those of tokens that were added."""
    last = len(base.tokenizer) - 1
    return torch.cat([some_ids(), torch.tensor([[last, last - 1]] * 2)], dim=1)


@pytest.fixture(scope="module")
def tuned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return tune(tiny_llama, tmp_path_factory.mktemp("tuned") / "adapter")


@pytest.fixture
def adapter(tuned: Tuned, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tuned.folder, tmp_path / "adapter"))


class TestBackFromTheDisk:
    @pytest.mark.parametrize("quantization", [NF4, EIGHT, SIXTEEN], ids=["4", "8", "16"])
    @pytest.mark.parametrize(
        "lora",
        [
            LoraSpec(r=4),
            LoraSpec(r=4, use_rslora=True, target_modules=("q_proj", "up_proj")),
            LoraSpec(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}),
            LoraSpec(r=4, modules_to_save=("lm_head",)),
            LoraSpec(r=4, new_tokens=("<one>", "<two>")),
        ],
        ids=["plain", "rslora", "patterns", "saved head", "new tokens"],
    )
    def test_the_same_numbers(
        self,
        tiny_llama_untied: Path,
        tmp_path: Path,
        lora: LoraSpec,
        quantization: QuantizationSpec,
    ) -> None:
        tuned = tune(tiny_llama_untied, tmp_path / "adapter", lora, quantization)
        base = load(tiny_llama_untied, quantization, adapter=tuned.folder)
        untrained = logits(base.model, some_ids())
        model, findings = load_adapter(base, quantization, tuned.folder)
        assert findings == []
        torch.testing.assert_close(logits(model, ids_of(base)), tuned.logits, rtol=0, atol=0)
        assert (tuned.logits[:, :12] - untrained).abs().max() > 0.01, "the adapter says nothing"
        assert not any(value.requires_grad for value in model.parameters())
        assert not model.training

    def test_tokens_beyond_the_spare_rows_of_the_embedding(self, tmp_path: Path) -> None:
        """The embedding grew in training, and has to grow again; PEFT would have written it whole,
        or asked the hub whether it grew.
        """
        num_tokens = len(load(build_llama(tmp_path / "roomy")).tokenizer)
        full = build_llama(tmp_path / "full", vocab_size=num_tokens)
        tuned = tune(full, tmp_path / "adapter", LoraSpec(r=4, new_tokens=("<one>", "<two>")))
        shapes = [tuple(value.shape) for value in load_file(tuned.folder / WEIGHTS_FILE).values()]
        assert max(rows for rows, _ in shapes) < num_tokens, "the embedding was written"
        base = load(full, adapter=tuned.folder)
        model, findings = load_adapter(base, NF4, tuned.folder)
        assert findings == []
        assert base.model.get_input_embeddings().weight.shape[0] == num_tokens + 2
        torch.testing.assert_close(logits(model, ids_of(base)), tuned.logits, rtol=0, atol=0)


class TestWhatIsWritten:
    def test_the_files(self, tuned: Tuned) -> None:
        names = {path.name for path in tuned.folder.iterdir()}
        assert {WEIGHTS_FILE, CONFIG_FILE, MANIFEST_FILE, "generation_config.json"} <= names
        assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
        assert "README.md" not in names, "PEFT's is a form that nobody filled in"
        assert [path.name for path in tuned.folder.parent.iterdir()] == ["adapter"]

    def test_weights_are_the_adapter_s_alone(self, tuned: Tuned) -> None:
        weights = load_file(tuned.folder / WEIGHTS_FILE)
        assert len(weights) == 2 * 14
        assert all(".lora_A." in name or ".lora_B." in name for name in weights)
        assert {value.dtype for value in weights.values()} == {torch.float32}

    def test_the_same_adapter_gives_the_same_bytes(
        self, tuned: Tuned, tiny_llama: Path, tmp_path: Path
    ) -> None:
        again = tune(tiny_llama, tmp_path / "again")
        twice = tmp_path / "twice"
        save_adapter(tuned.model, tuned.base, NF4, "0" * 64, twice)
        for name in (WEIGHTS_FILE, CONFIG_FILE, MANIFEST_FILE):
            first = file_sha256(tuned.folder / name)
            assert file_sha256(again.folder / name) == first
            assert file_sha256(twice / name) == first

    def test_names_are_in_an_order_that_no_hash_seed_changes(
        self, tuned: Tuned, tmp_path: Path
    ) -> None:
        """PEFT keeps them in sets, whose order differs from process to process."""
        names = {f"name{number}" for number in range(20)}
        config = tuned.model.peft_config["default"]
        before = config.target_modules, config.exclude_modules
        config.target_modules, config.exclude_modules = set(names), set(names)
        try:
            save_adapter(tuned.model, tuned.base, NF4, "0" * 64, tmp_path / "adapter")
        finally:
            config.target_modules, config.exclude_modules = before
        written = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
        assert written["target_modules"] == sorted(names)
        assert written["exclude_modules"] == sorted(names)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def ctrl_c(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


class TestASaveThatDies:
    @pytest.mark.parametrize("death", [full_disk, ctrl_c])
    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            (PeftModel, "save_pretrained"),
            (PreTrainedTokenizerBase, "save_pretrained"),
            (GenerationConfig, "save_pretrained"),
            (saved_module, "manifest_for"),
            (saved_module, "write_manifest"),
        ],
        ids=["adapter", "tokenizer", "generation config", "hashes", "manifest"],
    )
    def test_leaves_nothing_under_the_name_and_the_next_one_is_whole(
        self,
        tuned: Tuned,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        owner: Any,
        name: str,
        death: Callable[..., None],
    ) -> None:
        folder = tmp_path / "run" / "adapter"
        folder.parent.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, death)
            with pytest.raises((OSError, KeyboardInterrupt)):
                save_adapter(tuned.model, tuned.base, NF4, "0" * 64, folder)
        assert list(folder.parent.iterdir()) == []
        save_adapter(tuned.model, tuned.base, NF4, "0" * 64, folder)
        assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
        assert {path.name: file_sha256(path) for path in folder.iterdir()} == {
            path.name: file_sha256(path) for path in tuned.folder.iterdir()
        }

    def test_leaves_the_one_before_as_it_was(
        self, tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "adapter"
        save_adapter(tuned.model, tuned.base, NF4, "1" * 64, folder)
        with monkeypatch.context() as patch:
            patch.setattr(saved_module, "write_manifest", full_disk)
            with pytest.raises(OSError, match="No space left"):
                save_adapter(tuned.model, tuned.base, NF4, "2" * 64, folder)
        assert read_manifest(folder).recipe_sha256 == "1" * 64
        save_adapter(tuned.model, tuned.base, NF4, "3" * 64, folder)
        assert read_manifest(folder).recipe_sha256 == "3" * 64
        assert list(tmp_path.iterdir()) == [folder]

    def test_its_files_may_be_part_of_something_larger(self, tuned: Tuned, tmp_path: Path) -> None:
        """A checkpoint holds them beside its own."""
        write_adapter(tuned.model, tuned.base, NF4, "0" * 64, tmp_path)
        assert {path.name: file_sha256(path) for path in tmp_path.iterdir()} == {
            path.name: file_sha256(path) for path in tuned.folder.iterdir()
        }


class TestWhatLoadingSays:
    def test_another_precision_and_another_version(self, tiny_llama: Path, adapter: Path) -> None:
        manifest = read_manifest(adapter)
        older = replace(manifest, versions={**manifest.versions, "peft": "0.0.1"})
        write_manifest(older, adapter)
        base = load(tiny_llama, dtype=torch.bfloat16, adapter=adapter)
        _, findings = load_adapter(base, NF4, adapter)
        assert len(findings) == 2
        assert findings[0] == "trained in float32, now computing in bfloat16"
        assert findings[1].startswith("trained with peft 0.0.1, this is ")

    def test_another_base_is_refused_and_forced_in_words(
        self, adapter: Path, tmp_path: Path
    ) -> None:
        other = build_llama(tmp_path / "other", seed=5)
        base = load(other, adapter=adapter)
        before = list(base.model.state_dict())
        with pytest.raises(AdapterError, match="does not belong to this base"):
            load_adapter(base, NF4, adapter)
        assert list(base.model.state_dict()) == before, "it was put on before it was refused"
        model, findings = load_adapter(base, NF4, adapter, force=True)
        (said,) = findings
        assert said.startswith("forced onto another base: the weights: ")
        assert torch.isfinite(logits(model)).all()

    def test_an_adapter_of_no_known_base_is_forced_in_words(
        self, tiny_llama: Path, adapter: Path
    ) -> None:
        (adapter / MANIFEST_FILE).unlink()
        base = load(tiny_llama, adapter=adapter)
        _, findings = load_adapter(base, NF4, adapter, force=True)
        (said,) = findings
        assert said.startswith("forced onto another base: ")
        assert "nothing of its base is known" in said

    @pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE])
    def test_a_folder_without_an_adapter(self, tuned: Tuned, adapter: Path, name: str) -> None:
        (adapter / name).unlink()
        for force in (False, True):
            with pytest.raises(AdapterError, match=rf"holds no adapter \(no {name}\)"):
                load_adapter(tuned.base, NF4, adapter, force)


class TestDamageThatWasForced:
    """What the manifest would have refused fails in one message, and not in the library."""

    @pytest.fixture
    def base(self, tiny_llama: Path) -> Base:
        return load(tiny_llama)

    def test_weights_that_were_cut_off(self, base: Base, adapter: Path) -> None:
        path = adapter / WEIGHTS_FILE
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(AdapterError, match="cannot be loaded onto"):
            load_adapter(base, NF4, adapter, force=True)

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"peft_type": "NONSENSE"}'])
    def test_a_config_that_is_none(self, base: Base, adapter: Path, text: str) -> None:
        (adapter / CONFIG_FILE).write_text(text)
        with pytest.raises(AdapterError, match="cannot be loaded onto"):
            load_adapter(base, NF4, adapter, force=True)

    def test_a_base_of_other_shapes(self, adapter: Path, tmp_path: Path) -> None:
        other = load(build_llama(tmp_path / "other", hidden_size=128), adapter=adapter)
        with pytest.raises(AdapterError, match=r"cannot be loaded onto .*shape"):
            load_adapter(other, NF4, adapter, force=True)


@pytest.mark.parametrize(
    ("said", "number"),
    [("No space left on device (os error 28)", errno.ENOSPC), ("something else", None)],
)
def test_a_tokenizer_that_the_disk_refuses(tmp_path: Path, said: str, number: int | None) -> None:
    """The library of tokenizers raises a plain Exception."""

    class Refused:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception(said)

    with pytest.raises(Exception, match=r"space|else") as error:
        write_tokenizer(Refused(), tmp_path)  # type: ignore[arg-type]
    assert getattr(error.value, "errno", None) == number
