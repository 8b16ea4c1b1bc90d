"""After a training that is aware of quantization, the quantized model is the trained one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.artifact.record import read_record
from qlora_kit.checkpoint.run_directory import RunDirectory
from qlora_kit.data.prepare import Part, prepare_eval
from qlora_kit.environment import probe_hardware
from qlora_kit.errors import ModelError, RunError
from qlora_kit.export.chain import base_name
from qlora_kit.export.merge_run import merge_after_training, merge_reopened
from qlora_kit.export.quantized import Quantizer, write_quantized
from qlora_kit.export.reopen import reopen_adapter
from qlora_kit.export.trained import trained_adapter
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.base import Base
from qlora_kit.model.qat.attach import fake_quantization_of
from qlora_kit.model.qat.aware import aware_of
from qlora_kit.model.quantized import never_repacked
from qlora_kit.model.saved import load_adapter, save_adapter
from qlora_kit.recipe import MergeSpec, Recipe, load_recipe, save_recipe
from qlora_kit.records import file_sha256
from qlora_kit.runtime.footprint import parameters_by_form

from .tiny_runs import CONFIGS, load, save_model, shake, some_ids

METHODS: dict[str, dict[str, Any]] = {
    "nf4": {"method": "nf4"},
    "nf4 in blocks of 32": {"method": "nf4", "block_size": 32, "double_quant": False},
    "int8": {"method": "int8"},
    "int4-group": {"method": "int4-group", "group_size": 32},
}


@dataclass(frozen=True)
class AwareRun:
    """A run as a training that is aware of quantization leaves it."""

    run: RunDirectory
    recipe: Recipe
    base: Base
    model: Any
    held_out: Part

    def merge(self) -> dict[str, Any]:
        certificate = merge_after_training(
            self.model, self.base, self.held_out, self.recipe, self.run, probe_hardware()
        )
        assert certificate is not None
        return certificate

    def logits(self) -> torch.Tensor:
        return logits_of(self.model)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=some_ids()).logits
    return logits


def reloaded(folder: Path, **options: Any) -> torch.Tensor:
    """As plain transformers has it, but for bitsandbytes' products in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    never_repacked(model)
    return logits_of(model)


def make_run(
    folder: Path,
    aware: dict[str, Any],
    kind: str = "llama-tied",
    lora: dict[str, Any] | None = None,
    stored: torch.dtype = torch.float32,
    **merge_options: Any,
) -> AwareRun:
    save_model(folder / "base", CONFIGS[kind](), stored)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"w{i} w{i + 3}"},
                {"role": "assistant", "content": f"w{2 * i} w{i + 9} w7"},
            ]
        }
        for i in range(6)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        "model": {"name_or_path": str(folder / "base")},
        "quantization": {"load_in_4bit": False},
        "quantization_aware": aware,
        "lora": {} if aware.get("train") == "full" else {"r": 4, **(lora or {})},
        "data": {
            "train": [{"path": str(folder / "more.jsonl")}],
            "eval": [{"path": str(folder / "rows.jsonl")}],
        },
        "export": {"merge": True, "merge_options": {"max_kl": 1e-6, **merge_options}},
        "run_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(folder / "recipe.yaml")
    run = RunDirectory(folder / "run")
    run.folder.mkdir()
    save_recipe(recipe, run.recipe)
    base = load(folder / "base", recipe.quantization)
    merged_dtype = recipe.export.merge_options.dtype
    seen = aware_of(recipe.quantization_aware, merged_dtype, base.compute_dtype)
    model = attach_adapter(base, recipe.lora, 0, seen).model
    shake(model)
    save_adapter(model, base, recipe.quantization, "0" * 64, run.adapter)
    held_out = prepare_eval(recipe.data, base.tokenizer, base.stop_ids)
    return AwareRun(run, recipe, base, model, held_out)


def require_same_again(made: AwareRun, out: Path) -> None:
    """Merged from the disk into `out`, it is the model that the run has shipped."""
    first = made.merge()
    reopened = reopen_adapter(made.run.folder, probe_hardware())
    second = merge_reopened(reopened, out, MergeSpec(max_kl=1e-6), probe_hardware())
    assert second["divergence"] == first["divergence"]
    again = out.with_name(f"{out.name}-quantized") / "model.safetensors"
    assert file_sha256(again) == file_sha256(made.run.quantized / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_the_quantized_model_is_the_trained_graph(tmp_path: Path, method: str) -> None:
    made = make_run(tmp_path, METHODS[method])
    certificate = made.merge()
    assert certificate["passed"], certificate
    assert certificate["dtype"] == METHODS[method]["method"]
    assert certificate["divergence"]["kl_mean"] <= 1e-6
    assert certificate["divergence"]["max_abs_delta_logp"] == 0.0
    assert torch.equal(reloaded(made.run.quantized), made.logits())
    assert not torch.allclose(reloaded(made.run.merged), made.logits(), atol=1e-3)
    record = read_record(made.run.quantized)
    assert record.settings == {"base": "original", "dtype": METHODS[method]["method"]}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(record.files)
    for name, digest in record.files.items():
        assert file_sha256(made.run.quantized / name) == digest.sha256
    beside = json.loads((made.run.merged / "certificate.json").read_text())
    assert (beside["passed"], beside["max_kl"], beside["dtype"]) == (True, None, "float32")
    assert beside["divergence"]["kl_mean"] > 1e-5
    assert METHODS[method]["method"] in (made.run.merged / "README.md").read_text()
    assert "at every step of the training" in (made.run.quantized / "README.md").read_text()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_other_architectures(tmp_path: Path, kind: str) -> None:
    """An untied head, layers that are the other way round, biases."""
    made = make_run(tmp_path, {"method": "nf4"}, kind)
    assert made.merge()["passed"]
    assert torch.equal(reloaded(made.run.quantized), made.logits())


class TestFull:
    """The weights themselves are trained."""

    @pytest.mark.parametrize("method", METHODS)
    def test_the_quantized_model_is_the_trained_graph(self, tmp_path: Path, method: str) -> None:
        made = make_run(tmp_path, {**METHODS[method], "train": "full"})
        certificate = made.merge()
        assert certificate["passed"], certificate
        assert certificate["divergence"]["kl_mean"] <= 1e-6
        assert certificate["divergence"]["max_abs_delta_logp"] == 0.0
        assert torch.equal(reloaded(made.run.quantized), made.logits())
        assert not torch.allclose(reloaded(made.run.merged), made.logits(), atol=1e-3)
        packed = "compressed-tensors" in read_record(made.run.quantized).versions
        assert packed == (not method.startswith("nf4"))
        for folder in (made.run.quantized, made.run.merged):
            card = (folder / "README.md").read_text()
            assert "The weights of all linear layers but the head were trained" in card
            assert "adapter" not in card.lower()
            assert "LoRA" not in card
            assert yaml.safe_load(card.split("---")[1])["tags"][0] == "quantization-aware-training"

    @pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
    def test_other_architectures(self, tmp_path: Path, kind: str) -> None:
        """An untied head, layers that are the other way round, biases, which are trained too."""
        made = make_run(tmp_path, {"method": "nf4", "train": "full"}, kind)
        assert made.merge()["passed"]
        assert torch.equal(reloaded(made.run.quantized), made.logits())

    @pytest.mark.parametrize("kind", ["llama-tied", "qwen2"])
    def test_merged_in_16_bits(self, tmp_path: Path, kind: str) -> None:
        """What was trained in float32 is rounded in training as it is on the disk."""
        aware = {"method": "int8", "train": "full"}
        made = make_run(tmp_path, aware, kind, stored=torch.bfloat16, dtype="bfloat16")
        assert made.merge()["passed"]
        assert torch.equal(reloaded(made.run.quantized), made.logits())

    def test_what_is_merged_is_what_was_trained(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, {"method": "nf4", "train": "full"})
        made.merge()
        merged = load_file(made.run.merged / "model.safetensors")
        layer = made.base.model.model.layers[1].mlp.up_proj
        assert torch.equal(merged["model.layers.1.mlp.up_proj.weight"], layer.weight)
        assert not torch.equal(layer.weight, layer.original_module.weight)
        before = load_file(tmp_path / "base" / "model.safetensors")
        name = "model.embed_tokens.weight"
        assert torch.equal(merged[name], before[name])

    def test_from_the_disk_it_is_the_graph_that_was_trained(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, {"method": "nf4", "train": "full"})
        base = load(tmp_path / "base", made.recipe.quantization)
        model, findings = load_adapter(base, made.recipe.quantization, made.run.adapter)
        assert findings == []
        assert torch.equal(logits_of(model), made.logits())
        counted = sum(parameters_by_form(model).values())
        assert counted == base.quantized.num_parameters

    def test_it_is_merged_again_from_the_disk(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, {"method": "int8", "train": "full"})
        require_same_again(made, tmp_path / "again")


def test_layers_without_an_adapter_are_quantized_as_well(tmp_path: Path) -> None:
    made = make_run(tmp_path, {"method": "int8"}, lora={"target_modules": ["q_proj"]})
    assert made.merge()["passed"]
    assert torch.equal(reloaded(made.run.quantized), made.logits())
    names = load_file(made.run.quantized / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight_packed" in names


def test_skipped_layers_are_merged_and_not_quantized(tmp_path: Path) -> None:
    """Their update is added on the disk, where training has added two products."""
    made = make_run(tmp_path, {"method": "nf4", "skip_modules": ["down_proj"]})
    assert made.merge()["divergence"]["max_abs_delta_logp"] < 1e-5
    torch.testing.assert_close(reloaded(made.run.quantized), made.logits(), rtol=0, atol=1e-5)
    tensors = load_file(made.run.quantized / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.float32
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8


@pytest.mark.parametrize("method", ["nf4", "int8", "int4-group"])
def test_merged_in_16_bits(tmp_path: Path, method: str) -> None:
    """The training has rounded to what is on the disk, before it quantized."""
    aware = METHODS[method]
    made = make_run(tmp_path, aware, stored=torch.bfloat16, dtype="bfloat16")
    certificate = made.merge()
    assert certificate["passed"]
    assert torch.equal(reloaded(made.run.quantized), made.logits())
    merged = load_file(made.run.merged / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_bitsandbytes_itself_makes_the_same_of_the_merged_model(tmp_path: Path) -> None:
    made = make_run(tmp_path, {"method": "nf4"})
    made.merge()
    stock = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    again = reloaded(made.run.merged, quantization_config=stock)
    assert torch.equal(again, made.logits())


def test_from_the_disk_it_is_the_graph_that_was_trained(tmp_path: Path) -> None:
    made = make_run(tmp_path, {"method": "nf4"})
    base = load(tmp_path / "base", made.recipe.quantization)
    model, findings = load_adapter(base, made.recipe.quantization, made.run.adapter)
    assert findings == []
    assert torch.equal(logits_of(model), made.logits())
    quantization = fake_quantization_of(model)
    assert quantization is not None
    quantization.is_on = False
    assert not torch.equal(logits_of(model), made.logits())


def test_it_is_merged_again_from_the_disk(tmp_path: Path) -> None:
    made = make_run(tmp_path, {"method": "int4-group", "group_size": 32})
    require_same_again(made, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_an_unfinished_attempt_is_made_again(tmp_path: Path) -> None:
    made = make_run(tmp_path, {"method": "nf4"})
    made.run.quantized.mkdir()
    (made.run.quantized / "half.safetensors").touch()
    assert made.merge()["passed"]
    assert not (made.run.quantized / "half.safetensors").exists()


class TestRefused:
    def test_to_be_quantized_otherwise(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, {"method": "nf4"})
        reopened = reopen_adapter(made.run.folder, probe_hardware())
        with pytest.raises(RunError, match="trained quantized to nf4"):
            merge_reopened(
                reopened, tmp_path / "x", MergeSpec(), probe_hardware(), requantize_to="fp4"
            )
        assert not (tmp_path / "x").exists()

    def test_to_be_rounded_otherwise(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, {"method": "nf4"})
        reopened = reopen_adapter(made.run.folder, probe_hardware())
        with pytest.raises(ModelError, match=r"rounded to float32.*leave dtype on auto"):
            merge_reopened(reopened, tmp_path / "x", MergeSpec(dtype="float16"), probe_hardware())
        assert not (tmp_path / "x").exists()

    def test_where_something_is_already(self, tmp_path: Path) -> None:
        made = make_run(tmp_path, {"method": "nf4"})
        (tmp_path / "x-quantized").mkdir()
        reopened = reopen_adapter(made.run.folder, probe_hardware())
        with pytest.raises(RunError, match="x-quantized exists already"):
            merge_reopened(reopened, tmp_path / "x", MergeSpec(), probe_hardware())


def test_shards(tmp_path: Path) -> None:
    made = make_run(tmp_path, {"method": "nf4"}, max_shard_bytes=60_000)
    assert made.merge()["passed"]
    assert len(list(made.run.quantized.glob("*.safetensors"))) > 1
    assert torch.equal(reloaded(made.run.quantized), made.logits())


def test_a_plain_merge_quantized_again_is_not_what_was_trained(tmp_path: Path) -> None:
    """What the whole is for: the same adapter, trained in 16 bits, and quantized afterwards."""
    made = make_run(tmp_path, {"method": "nf4"})
    quantization = fake_quantization_of(made.model)
    assert quantization is not None
    quantization.is_on = False
    unaware = made.logits()
    made.merge()
    out = tmp_path / "out"
    out.mkdir()
    trained = trained_adapter(
        made.run.adapter, made.base, made.recipe.quantization, made.recipe.model
    )
    assert trained.aware is not None
    assert base_name(trained) == "nf4 base", "with its adapter off it is quantized as well"
    quantizer = Quantizer(trained.skeleton, trained.aware, torch.float32, "cpu")
    write_quantized(made.run.merged, out, quantizer, 10**9)
    assert not torch.allclose(reloaded(out), unaware, atol=0.05)
