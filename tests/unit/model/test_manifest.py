"""An adapter knows its base: every fact that decides is refused by name, the others are told."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, build_llama

from qlora_kit.errors import AdapterError
from qlora_kit.model import manifest as manifest_module
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.base import Base
from qlora_kit.model.manifest import (
    MANIFEST_FILE,
    base_of,
    changed_circumstances,
    differences,
    manifest_for,
    read_manifest,
    require_own_base,
    stored_settings,
    write_manifest,
)
from qlora_kit.model.saved import save_adapter
from qlora_kit.recipe import LoraSpec, ModelSpec, QuantizationSpec
from qlora_kit.records import file_sha256

from .zoo import load, shake

TRAINED_WITH = QuantizationSpec()


@dataclass(frozen=True)
class Saved:
    """An adapter on disk, and the base that it was trained on."""

    base: Base
    folder: Path


@pytest.fixture(scope="module")
def saved(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    base = load(tiny_llama, TRAINED_WITH)
    model = attach_adapter(base, LoraSpec(r=4), 0).model
    shake(model)
    save_adapter(model, base, TRAINED_WITH, "0" * 64, folder)
    return Saved(base, folder)


@pytest.fixture
def adapter(saved: Saved, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved.folder, tmp_path / "adapter"))


def with_tokens(base: Base, *tokens: str) -> Base:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.add_tokens(list(tokens))
    return replace(base, tokenizer=tokenizer)


def with_template(base: Base, template: str | None) -> Base:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = template
    return replace(base, tokenizer=tokenizer)


def refusal(folder: Path, base: Base, quantization: QuantizationSpec = TRAINED_WITH) -> list[str]:
    """The facts that a refusal names, one a line; force returns the very same."""
    with pytest.raises(AdapterError, match="does not belong to this base") as error:
        require_own_base(folder, base, quantization)
    said = str(error.value)
    assert str(folder) in said
    assert "--force" in said
    named = [line.removeprefix("  - ") for line in said.splitlines() if line.startswith("  - ")]
    assert require_own_base(folder, base, quantization, force=True) == named
    return named


def test_its_own_base_is_taken_without_a_word(saved: Saved) -> None:
    assert require_own_base(saved.folder, saved.base, TRAINED_WITH) == []
    manifest = read_manifest(saved.folder)
    assert differences(manifest, saved.base, TRAINED_WITH) == []
    assert changed_circumstances(manifest, saved.base) == []


class TestWhatDecides:
    def test_other_weights_of_the_same_shapes(self, saved: Saved, tmp_path: Path) -> None:
        other = load(build_llama(tmp_path / "other", seed=5), TRAINED_WITH)
        (fact,) = refusal(saved.folder, other)
        assert fact.startswith("the weights: trained on ")
        assert saved.base.source.name in fact
        assert str(tmp_path / "other") in fact
        assert saved.base.fingerprint[:12] in fact
        assert other.fingerprint[:12] in fact

    def test_another_configuration_of_the_same_weights(self, saved: Saved) -> None:
        config = json.loads(saved.base.configured)
        other = replace(saved.base, configured=json.dumps({**config, "rope_theta": 5.0}))
        (fact,) = refusal(saved.folder, other)
        assert fact.startswith("its config.json, by which it computes otherwise: rope_theta ")
        assert fact.endswith(" → 5.0")

    def test_a_manifest_of_an_earlier_version_says_nothing_of_it(self, saved: Saved) -> None:
        older = replace(read_manifest(saved.folder), base_config=None)
        assert differences(older, saved.base, TRAINED_WITH) == []

    @pytest.mark.parametrize(
        ("setting", "now", "said"),
        [
            ("quant_type", "fp4", "trained with nf4, now fp4"),
            ("double_quant", False, "trained with True, now False"),
            ("skip_modules", ("up_proj",), "trained with [], now ['up_proj']"),
            ("int8_threshold", 3.0, "trained with 6.0, now 3.0"),
            ("load_in_4bit", False, "trained with True, now False"),
            ("load_in_8bit", True, "trained with False, now True"),
        ],
    )
    def test_each_setting_of_the_quantization(
        self, saved: Saved, setting: str, now: object, said: str
    ) -> None:
        """One at a time, even where a recipe would have to change two."""
        changed = TRAINED_WITH.model_copy(update={setting: now})
        assert refusal(saved.folder, saved.base, changed) == [f"quantization.{setting}: {said}"]

    def test_every_setting_decides_or_is_known_not_to(self) -> None:
        """A new setting has to be put on one side or the other."""
        undecisive = {"compute_dtype", "upcast_norms", "quant_storage"}
        assert set(manifest_module._DECISIVE) == set(QuantizationSpec.model_fields) - undecisive

    def test_another_tokenizer(self, saved: Saved) -> None:
        (fact,) = refusal(saved.folder, with_tokens(saved.base, "<new>"))
        assert fact.startswith("the tokenizer: ")

    @pytest.mark.parametrize("template", [None, CHATML + "\n"])
    def test_another_chat_template(self, saved: Saved, template: str | None) -> None:
        (fact,) = refusal(saved.folder, with_template(saved.base, template))
        assert fact.startswith("the chat template: ")

    @pytest.mark.parametrize(
        "name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"]
    )
    def test_a_file_that_was_altered_or_is_gone(
        self, saved: Saved, adapter: Path, name: str
    ) -> None:
        path = adapter / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        said = f"the file {name}: missing or changed since it was saved"
        assert refusal(adapter, saved.base) == [said]
        path.unlink()
        assert refusal(adapter, saved.base) == [said]

    def test_all_of_it_at_once(self, saved: Saved, adapter: Path) -> None:
        (adapter / "adapter_config.json").write_text("{}")
        base = replace(with_template(with_tokens(saved.base, "<new>"), None), fingerprint="f" * 64)
        changed = QuantizationSpec(quant_type="fp4", double_quant=False)
        named = refusal(adapter, base, changed)
        assert [fact.partition(":")[0] for fact in named] == [
            "the file adapter_config.json",
            "the weights",
            "quantization.quant_type",
            "quantization.double_quant",
            "the tokenizer",
            "the chat template",
        ]

    def test_an_adapter_that_says_nothing_of_its_base(self, saved: Saved, adapter: Path) -> None:
        (adapter / MANIFEST_FILE).unlink()
        with pytest.raises(AdapterError, match=f"has no {MANIFEST_FILE}, so nobody knows which"):
            require_own_base(adapter, saved.base, TRAINED_WITH)
        (said,) = require_own_base(adapter, saved.base, TRAINED_WITH, force=True)
        assert "nothing of its base is known" in said


class TestWhatIsOnlyTold:
    def test_another_precision(self, saved: Saved) -> None:
        base = replace(saved.base, compute_dtype=torch.bfloat16)
        assert require_own_base(saved.folder, base, TRAINED_WITH) == []
        told = changed_circumstances(read_manifest(saved.folder), base)
        assert told == ["trained in float32, now computing in bfloat16"]

    @pytest.mark.parametrize("name", ["torch", "transformers", "bitsandbytes", "peft"])
    def test_another_version(self, saved: Saved, name: str) -> None:
        manifest = read_manifest(saved.folder)
        older = replace(manifest, versions={**manifest.versions, name: "0.0.1"})
        assert differences(older, saved.base, TRAINED_WITH) == []
        (told,) = changed_circumstances(older, saved.base)
        assert told == f"trained with {name} 0.0.1, this is {manifest.versions[name]}"

    def test_versions_of_packages_that_compute_nothing_are_not_told(self, saved: Saved) -> None:
        manifest = read_manifest(saved.folder)
        older = replace(manifest, versions={**manifest.versions, "datasets": "0.0.1"})
        assert changed_circumstances(older, saved.base) == []

    def test_another_packing_of_the_same_numbers(self, saved: Saved) -> None:
        packed = QuantizationSpec(quant_storage="bfloat16")
        assert require_own_base(saved.folder, saved.base, packed) == []


def drop(name: str) -> dict[str, Any]:
    return {name: ...}


class TestDamage:
    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"\xff\xfe", b"[" * 100_000],
        ids=["empty", "cut off", "not text", "nested without end"],
    )
    def test_what_is_not_json(self, adapter: Path, content: bytes) -> None:
        (adapter / MANIFEST_FILE).write_bytes(content)
        with pytest.raises(AdapterError, match="is not JSON; the adapter is damaged"):
            read_manifest(adapter)

    @pytest.mark.parametrize(("content", "kind"), [("[]", "list"), ('"x"', "str"), ("1", "int")])
    def test_what_is_no_mapping(self, adapter: Path, content: str, kind: str) -> None:
        (adapter / MANIFEST_FILE).write_text(content)
        with pytest.raises(AdapterError, match=f"is no manifest: it holds a {kind}"):
            read_manifest(adapter)

    def test_a_folder_in_its_place(self, adapter: Path) -> None:
        (adapter / MANIFEST_FILE).unlink()
        (adapter / MANIFEST_FILE).mkdir()
        with pytest.raises(AdapterError, match="cannot be read"):
            read_manifest(adapter)

    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            (drop("base_name"), "base_name"),
            (drop("base_fingerprint"), "base_fingerprint"),
            (drop("quantization"), "quantization"),
            (drop("files"), "files"),
            (drop("qlora_kit_version"), "qlora_kit_version"),
            ({"base_name": 1}, "base_name"),
            ({"base_revision": 1}, "base_revision"),
            ({"base_gguf_file": []}, "base_gguf_file"),
            ({"base_config": {}}, "base_config"),
            ({"chat_template_sha256": 1}, "chat_template_sha256"),
            ({"tokenizer_sha256": None}, "tokenizer_sha256"),
            ({"recipe_sha256": {}}, "recipe_sha256"),
            ({"quantization": "nf4"}, "quantization"),
            ({"versions": ["torch"]}, "versions"),
            ({"files": ["adapter_config.json"]}, "files"),
            ({"qlora_kit_version": 1}, "qlora_kit_version"),
            ({"format": "1"}, "format"),
            ({"format": None}, "format"),
            ({"format": True}, "format"),
        ],
    )
    def test_a_value_that_is_missing_or_of_another_type(
        self, adapter: Path, changed: dict[str, Any], named: str
    ) -> None:
        values = {**json.loads((adapter / MANIFEST_FILE).read_text()), **changed}
        kept = {name: value for name, value in values.items() if value is not ...}
        (adapter / MANIFEST_FILE).write_text(json.dumps(kept))
        with pytest.raises(AdapterError, match="is damaged") as error:
            read_manifest(adapter)
        assert named in str(error.value)
        assert str(adapter / MANIFEST_FILE) in str(error.value)

    @pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/file", "..\\..//x"])
    def test_files_outside_the_folder_are_not_looked_at(
        self, saved: Saved, adapter: Path, name: str
    ) -> None:
        (adapter.parent / "secret").write_text("mine")
        manifest = read_manifest(adapter)
        files = {**manifest.files, name: file_sha256(adapter.parent / "secret")}
        write_manifest(replace(manifest, files=files), adapter)
        for force in (False, True):
            with pytest.raises(AdapterError, match="is damaged: files holds"):
                require_own_base(adapter, saved.base, TRAINED_WITH, force)

    @pytest.mark.parametrize("digest", [None, 5])
    def test_a_digest_that_is_none(self, adapter: Path, digest: object) -> None:
        values = json.loads((adapter / MANIFEST_FILE).read_text())
        values["files"]["adapter_config.json"] = digest
        (adapter / MANIFEST_FILE).write_text(json.dumps(values))
        with pytest.raises(AdapterError, match=r"files holds 'adapter_config\.json'"):
            read_manifest(adapter)

    def test_a_newer_format(self, adapter: Path) -> None:
        """Whatever else is in it: it is not called damaged."""
        newer = {"format": 2, "qlora_kit_version": "9.9", "anything": "else"}
        (adapter / MANIFEST_FILE).write_text(json.dumps(newer))
        with pytest.raises(AdapterError, match=r"written by a newer qlora-kit \(9\.9\)"):
            read_manifest(adapter)

    @pytest.mark.parametrize(
        "quantization", [{"quant_type": "nf5"}, {"double_quant": "perhaps"}, {"skip_modules": 3}]
    )
    def test_a_quantization_that_is_none(self, saved: Saved, quantization: dict[str, Any]) -> None:
        manifest = replace(read_manifest(saved.folder), quantization=quantization)
        with pytest.raises(AdapterError, match="damaged: its quantization is none"):
            stored_settings(manifest, saved.folder)


class TestWhatIsWritten:
    def test_it_comes_back_as_it_was(self, saved: Saved) -> None:
        manifest = manifest_for(saved.base, TRAINED_WITH, "0" * 64, saved.folder)
        assert read_manifest(saved.folder) == manifest
        assert asdict(manifest) == json.loads((saved.folder / MANIFEST_FILE).read_text())

    def test_every_other_file_is_in_it(self, saved: Saved) -> None:
        files = read_manifest(saved.folder).files
        assert set(files) == {path.name for path in saved.folder.iterdir()} - {MANIFEST_FILE}
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= set(files)

    def test_settings_come_back_with_the_dtype_that_auto_became(self, saved: Saved) -> None:
        settings = stored_settings(read_manifest(saved.folder), saved.folder)
        assert settings == TRAINED_WITH.model_copy(
            update={"compute_dtype": "float32", "upcast_norms": False}
        )

    def test_a_relative_base_is_named_for_good(
        self, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "models" / "one").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        source = replace(saved.base.source, name="models/one")
        base = replace(saved.base, source=source)
        manifest = manifest_for(base, TRAINED_WITH, "0" * 64, saved.folder)
        assert manifest.base_name == str(tmp_path / "models" / "one")

    @pytest.mark.parametrize("flag", ["trust_remote_code", "allow_pickle"])
    def test_only_the_user_says_whether_code_may_run(self, saved: Saved, flag: str) -> None:
        """A manifest that claims a right of its own is not believed."""
        values = json.loads((saved.folder / MANIFEST_FILE).read_text())
        claimed = {**values, flag: True, "quantization": {**values["quantization"], flag: True}}
        manifest = manifest_module._manifest(saved.folder / MANIFEST_FILE, claimed)
        unasked = base_of(manifest, ModelSpec(name_or_path="x"))
        assert (unasked.trust_remote_code, unasked.allow_pickle) == (False, False)
        allowed = base_of(manifest, ModelSpec(name_or_path="x", **{flag: True}))
        assert getattr(allowed, flag)
        assert allowed.name_or_path == saved.base.source.name

    def test_a_base_is_found_again_by_revision_and_file(self, saved: Saved) -> None:
        manifest = read_manifest(saved.folder)
        hub = replace(
            manifest, base_name="owner/name", base_revision="abc", base_gguf_file="q.gguf"
        )
        spec = base_of(hub, ModelSpec(name_or_path="x", revision="mine", gguf_file="mine.gguf"))
        assert (spec.name_or_path, spec.revision, spec.gguf_file) == ("owner/name", "abc", "q.gguf")
