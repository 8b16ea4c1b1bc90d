"""RUN|MODEL: a run, an adapter folder and a whole model each load; nothing foreign unasked."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import CHATML, build_llama
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit import environment, subject
from qlora_kit.checkpoint.run_directory import create_run
from qlora_kit.environment import probe_hardware, resolve_compute_dtype
from qlora_kit.errors import AdapterError, ModelError, QloraKitError, RunError
from qlora_kit.export.reopen import reopen_adapter
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.base import load_base, prepare_for_training, upcasts_norms
from qlora_kit.model.manifest import MANIFEST_FILE, read_manifest, stored_settings, write_manifest
from qlora_kit.model.quantized import never_repacked
from qlora_kit.model.saved import save_adapter
from qlora_kit.recipe import LoraSpec, ModelSpec, QuantizationSpec, recipe_from_dict, save_recipe
from qlora_kit.report.reporter import Reporter
from qlora_kit.subject import Subject, load_subject


class Heard(Reporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@dataclass(frozen=True)
class Trained:
    """A run as training leaves it, with a tied base in FP4, which is not what is taken unasked."""

    folder: Path
    model: Path
    logits: torch.Tensor

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert isinstance(found, torch.Tensor)
    return found


def logits_of(loaded: Subject) -> torch.Tensor:
    return logits(loaded.model)


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained") / "run"
    recipe = recipe_from_dict(
        {
            "model": {"name_or_path": str(tiny_llama)},
            "quantization": {"quant_type": "fp4", "compute_dtype": "float32"},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "run_dir": str(folder),
        },
        "test",
    )
    base = load_base(recipe.model, recipe.quantization, torch.float32, "a test", probe_hardware())
    prepare_for_training(base.model, upcast_norms=False)
    model = attach_adapter(base, LoraSpec(r=4), 0).model
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    run = create_run(recipe)
    save_adapter(model, base, recipe.quantization, "0" * 64, run.adapter)
    return Trained(folder, tiny_llama, logits(model.eval()))


@pytest.fixture
def adapter(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the adapter alone, to damage."""
    return Path(shutil.copytree(trained.adapter, tmp_path / "adapter"))


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.folder, tmp_path / "run"))


def wide_norms(model: torch.nn.Module) -> set[bool]:
    return {
        value.dtype == torch.float32
        for name, value in model.named_parameters()
        if "norm" in name and "lora" not in name
    }


@pytest.mark.parametrize("asked", [True, False])
def test_it_computes_as_it_was_trained(
    asked: bool, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever `auto` would stand for on this machine, and whoever opens it."""
    machine = replace(probe_hardware(), native_bf16=True)
    monkeypatch.setattr(subject, "probe_hardware", lambda: machine)
    folder = tmp_path / "run"
    recipe = recipe_from_dict(
        {
            "model": {"name_or_path": str(tiny_llama)},
            "quantization": {"upcast_norms": asked},
            "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]},
            "run_dir": str(folder),
        },
        "test",
    )
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    base = load_base(recipe.model, recipe.quantization, torch.bfloat16, "a test", machine)
    prepare_for_training(base.model, upcasts_norms(recipe.quantization, torch.bfloat16))
    model = attach_adapter(base, LoraSpec(r=4), 0).model
    run = create_run(recipe)
    save_adapter(model, base, recipe.quantization, "0" * 64, run.adapter)
    assert wide_norms(model) == {asked}
    for name in (folder, folder / "adapter"):
        loaded = load_subject(str(name))
        assert loaded.base.compute_dtype == torch.bfloat16
        assert wide_norms(loaded.model) == {asked}
        again = reopen_adapter(Path(name), machine, data=tmp_path / "rows.jsonl")
        assert again.trained.compute_dtype == torch.bfloat16
        assert wide_norms(again.take_model()) == {asked}


def test_a_run_in_full_precision_is_not_opened_in_half(
    trained: Trained, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its recipe may leave it to `train.precision`, or to what another machine had."""
    machine = replace(probe_hardware(), native_bf16=True)
    monkeypatch.setattr(subject, "probe_hardware", lambda: machine)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("compute_dtype: float32", "compute_dtype: auto"))
    loaded = load_subject(str(run))
    assert loaded.base.compute_dtype == torch.float32
    torch.testing.assert_close(logits_of(loaded), trained.logits, rtol=0, atol=0)


def test_a_manifest_of_before_means_wide_norms(run: Path) -> None:
    path = run / "adapter" / MANIFEST_FILE
    values = json.loads(path.read_text())
    assert values["quantization"]["upcast_norms"] is False
    assert stored_settings(read_manifest(run / "adapter"), run).upcast_norms is False
    del values["quantization"]["upcast_norms"]
    path.write_text(json.dumps(values))
    assert stored_settings(read_manifest(run / "adapter"), run).upcast_norms is True


class TestWhatLoads:
    def test_a_run(self, trained: Trained) -> None:
        heard = Heard()
        loaded = load_subject(str(trained.folder), reporter=heard)
        torch.testing.assert_close(logits_of(loaded), trained.logits, rtol=0, atol=0)
        assert heard.warnings == []
        assert loaded.has_adapter
        assert loaded.run is not None
        assert loaded.run.folder == trained.folder
        assert loaded.recipe is not None
        assert loaded.recipe.quantization.quant_type == "fp4"

    def test_an_adapter_on_the_base_and_in_the_bits_that_it_was_trained_on(
        self, trained: Trained, adapter: Path
    ) -> None:
        heard = Heard()
        loaded = load_subject(str(adapter), reporter=heard)
        torch.testing.assert_close(logits_of(loaded), trained.logits, rtol=0, atol=0)
        assert heard.warnings == []
        assert (loaded.has_adapter, loaded.run, loaded.recipe) == (True, None, None)
        assert loaded.base.source.name == str(trained.model)

    def test_a_model_as_it_stands(self, trained: Trained) -> None:
        loaded = load_subject(str(trained.model))
        plain = AutoModelForCausalLM.from_pretrained(trained.model).eval()
        torch.testing.assert_close(logits_of(loaded), logits(plain), rtol=1e-4, atol=1e-5)
        assert loaded.base.quantized.num_quantized == 0
        assert (loaded.has_adapter, loaded.run, loaded.recipe) == (False, None, None)

    @pytest.mark.parametrize(
        "stored",
        [
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0),
        ],
        ids=["fp4", "nf4", "int8"],
    )
    def test_a_model_that_is_stored_quantized(
        self, trained: Trained, tmp_path: Path, stored: BitsAndBytesConfig
    ) -> None:
        folder = tmp_path / "stored"
        shutil.copytree(trained.model, folder)
        (folder / "model.safetensors").unlink()
        model = AutoModelForCausalLM.from_pretrained(trained.model, quantization_config=stored)
        model.save_pretrained(folder)
        never_repacked(model)
        loaded = load_subject(str(folder))
        assert loaded.base.quantized.num_quantized > 0
        torch.testing.assert_close(logits_of(loaded), logits(model.eval()), rtol=1e-4, atol=1e-4)

    def test_a_tilde_is_the_home_folder(
        self, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(adapter.parent))
        assert load_subject("~/adapter").has_adapter


class TestHowItIsRead:
    @pytest.fixture
    def pickled(self, trained: Trained, tmp_path: Path) -> Path:
        folder = Path(shutil.copytree(trained.model, tmp_path / "pickled"))
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        return folder

    def test_pickles_are_the_user_s_word_and_not_the_adapter_s(
        self, trained: Trained, adapter: Path, pickled: Path
    ) -> None:
        write_manifest(replace(read_manifest(adapter), base_name=str(pickled)), adapter)
        values = {**json.loads((adapter / MANIFEST_FILE).read_text()), "allow_pickle": True}
        (adapter / MANIFEST_FILE).write_text(json.dumps(values))
        with pytest.raises(ModelError, match="pickles"):
            load_subject(str(adapter))
        allowed = ModelSpec(name_or_path="x", allow_pickle=True)
        loaded = load_subject(str(adapter), allowed)
        torch.testing.assert_close(logits_of(loaded), trained.logits, rtol=0, atol=0)

    def test_a_plain_model_s_pickles_too(self, pickled: Path) -> None:
        with pytest.raises(ModelError, match="pickles"):
            load_subject(str(pickled))
        allowed = ModelSpec(name_or_path="x", allow_pickle=True)
        assert not load_subject(str(pickled), allowed).has_adapter

    def test_a_recipe_s_template_is_used_and_its_own_base_s_files_are_not_looked_for(
        self, trained: Trained, tmp_path: Path
    ) -> None:
        """A merged model measured with the recipe it came from, whose base was a GGUF file."""
        template = tmp_path / "template.jinja"
        template.write_text(CHATML + "\n")
        read_as = ModelSpec(
            name_or_path="owner/name",
            revision="abc",
            gguf_file="q4.gguf",
            tokenizer_name_or_path=str(tmp_path / "nowhere"),
            chat_template=str(template),
        )
        loaded = load_subject(str(trained.model), read_as)
        assert loaded.base.tokenizer.chat_template == template.read_text()
        assert loaded.base.source.gguf_file is None

    def test_a_recipe_s_own_base_is_read_as_it_says(self, trained: Trained, tmp_path: Path) -> None:
        """The very model that the recipe names keeps its tokenizer."""
        folder = Path(shutil.copytree(trained.model, tmp_path / "bare"))
        for path in folder.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(ModelError, match="no tokenizer"):
            load_subject(str(folder))
        read_as = ModelSpec(name_or_path=str(folder), tokenizer_name_or_path=str(trained.model))
        assert len(load_subject(str(folder), read_as).base.tokenizer) > 0


class TestWhatIsRefused:
    def test_an_adapter_that_says_nothing_of_its_base(self, adapter: Path) -> None:
        (adapter / MANIFEST_FILE).unlink()
        with pytest.raises(AdapterError, match=f"without {MANIFEST_FILE}") as error:
            load_subject(str(adapter))
        assert "how its base was quantized" in str(error.value)
        assert "give the run's folder instead" in str(error.value)

    def test_an_adapter_whose_base_changed(self, adapter: Path, tmp_path: Path) -> None:
        other = build_llama(tmp_path / "other", seed=5)
        write_manifest(replace(read_manifest(adapter), base_name=str(other)), adapter)
        with pytest.raises(AdapterError, match="does not belong to this base") as error:
            load_subject(str(adapter))
        assert "the weights: " in str(error.value)
        heard = Heard()
        loaded = load_subject(str(adapter), force=True, reporter=heard)
        assert isinstance(loaded.model, PeftModel)
        (said,) = heard.warnings
        assert said.startswith("forced onto another base: the weights: ")

    def test_a_run_whose_recipe_says_another_quantization(
        self, trained: Trained, run: Path
    ) -> None:
        recipe = load_subject(str(trained.folder)).recipe
        assert recipe is not None
        changed = recipe.model_copy(update={"quantization": QuantizationSpec(quant_type="nf4")})
        save_recipe(changed, run / "recipe.yaml")
        with pytest.raises(AdapterError, match="quant_type: trained with fp4, now nf4"):
            load_subject(str(run))
        heard = Heard()
        load_subject(str(run), force=True, reporter=heard)
        assert [line.partition(":")[0] for line in heard.warnings] == ["forced onto another base"]

    def test_a_run_without_an_adapter(self, run: Path) -> None:
        shutil.rmtree(run / "adapter")
        with pytest.raises(RunError, match="its training did not end"):
            load_subject(str(run))

    @pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "an empty folder"])
    def test_what_is_nothing_of_the_kind(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "an empty folder").mkdir()
        with pytest.raises(QloraKitError, match=name.rpartition("/")[2]):
            load_subject(name)


class TestAnotherMachine:
    """An adapter trained on a GPU in bfloat16 is loaded where that is only emulated."""

    @pytest.fixture(autouse=True)
    def _without_bf16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here = replace(
            probe_hardware(), device="cpu", native_bf16=False, slow_bf16=False, native_fp16=False
        )
        monkeypatch.setattr(subject, "probe_hardware", lambda: here)
        with pytest.raises(QloraKitError):
            resolve_compute_dtype("bfloat16", here)
        assert environment.resolve_compute_dtype("auto", here)[0] == "float32"

    def test_an_adapter_is_computed_in_what_there_is_and_that_is_said(
        self, trained: Trained, adapter: Path
    ) -> None:
        manifest = read_manifest(adapter)
        there = {**manifest.quantization, "compute_dtype": "bfloat16"}
        write_manifest(replace(manifest, quantization=there), adapter)
        heard = Heard()
        loaded = load_subject(str(adapter), reporter=heard)
        assert heard.warnings == ["trained in bfloat16, now computing in float32"]
        torch.testing.assert_close(logits_of(loaded), trained.logits, rtol=0, atol=0)

    def test_a_run_whose_recipe_names_it_too(self, trained: Trained, run: Path) -> None:
        recipe = load_subject(str(trained.folder)).recipe
        assert recipe is not None
        there = recipe.quantization.model_copy(update={"compute_dtype": "bfloat16"})
        save_recipe(recipe.model_copy(update={"quantization": there}), run / "recipe.yaml")
        assert load_subject(str(run)).base.compute_dtype == torch.float32
