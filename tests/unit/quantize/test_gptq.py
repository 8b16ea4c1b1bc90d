"""gptq and awq: what is made is read back by plain transformers, and is near its source."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_kit import extras
from qlora_kit.artifact.record import read_record
from qlora_kit.errors import HardwareError, ModelError, RecipeError

from .one_layer import Kept, build, by_the_line, calibration, check, logits_of, make


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases, a tied head, in 16 bits."""
    folder = tmp_path_factory.mktemp("gptq-qwen") / "source"
    return build(folder, "qwen2", dtype=torch.bfloat16, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def gptq(qwen: Path) -> Kept:
    return make(qwen, qwen.parent / "gptq", "gptq", "group_size=32")


@pytest.fixture(scope="module")
def awq(qwen: Path) -> Kept:
    return make(qwen, qwen.parent / "awq", "awq", "group_size=32", "grid=4")


def error_of(model: PreTrainedModel, kept: Kept) -> float:
    """How far its logits are from the source's, on the text that was calibrated on."""
    reference = kept.reference()
    rows = calibration().sequences
    wanted = torch.cat([logits_of(reference, row) for row in rows])
    found = torch.cat([logits_of(model.eval(), row) for row in rows])
    return float((found - wanted).norm() / wanted.norm())


def reloaded(kept: Kept) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(kept.folder, dtype=torch.float32)


def rounded(kept: Kept, group_size: int = 32, bits: int = 4) -> PreTrainedModel:
    """Each weight by itself to the nearest of 16 numbers: what both methods must beat."""
    model = kept.reference()
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.data.view(-1, group_size)
            scale = groups.abs().amax(dim=1, keepdim=True) * 2 / (2**bits - 1)
            low = -(2 ** (bits - 1))
            groups.copy_((groups / scale).round().clamp(low, -low - 1) * scale)
    return model


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_plain_transformers_loads_it(name: str, request: pytest.FixtureRequest) -> None:
    kept: Kept = request.getfixturevalue(name)
    config = json.loads((kept.folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["dtype"] == "bfloat16"
    assert kept.made.findings["num_layers"] == 7
    assert kept.made.findings["reload_logit_difference"] < 1e-4
    assert 0.005 < error_of(reloaded(kept), kept) < error_of(rounded(kept), kept)
    names = {path.name for path in kept.folder.iterdir()}
    assert {"tokenizer.json", "generation_config.json"} <= names
    assert "recipe.yaml" not in names, "it would be taken for a run's folder"
    assert not any(one.endswith(".yaml") for one in names), "an empty recipe says nothing"


def test_what_llmcompressor_says_is_kept_and_what_matters_is_told(gptq: Kept, awq: Kept) -> None:
    """Two heads share their values, so that what they are made of feeds nothing of its width."""
    (layers,) = gptq.made.notes
    assert layers == "7 linear layers in 4 bits"
    layers, unscaled = awq.made.notes
    assert unscaled.startswith("not scaled before rounding")
    assert any("mappings were skipped" in one for one in awq.made.findings["warnings"])


def test_layers_that_gptq_cannot_work_out_are_named(tmp_path: Path) -> None:
    """More inputs than there are tokens, and nothing to make up for it."""
    folder = build(tmp_path / "wide", "llama", intermediate_size=1024)
    kept = make(folder, tmp_path / "made", "gptq", "group_size=32", "dampening=1e-12")
    plainly = kept.made.notes[1]
    assert plainly.startswith("1 of 7 layers were rounded plainly")
    assert plainly.endswith("(model.layers.0.mlp.down_proj)")
    assert "--calibration-tokens" in plainly


def test_it_is_small(gptq: Kept, qwen: Path) -> None:
    """7 layers of 16 bits become 4 bits and a scale for every 32."""
    linear = 64 * (64 + 32 + 32 + 64 + 3 * 128)
    saved = (qwen / "model.safetensors").stat().st_size
    packed = (gptq.folder / "model.safetensors").stat().st_size
    assert saved - packed == pytest.approx(linear * (2 - 0.5 - 2 / 32), rel=0.1)


def test_nothing_is_left_behind(gptq: Kept, capfd: pytest.CaptureFixture[str]) -> None:
    before = set(Path.cwd().iterdir())
    kept = make(gptq.source.folder, gptq.folder.with_name("again"), "gptq", "group_size=null")
    assert set(Path.cwd().iterdir()) == before
    said = capfd.readouterr()
    assert "llmcompressor" not in said.out
    assert "it/s" not in said.err, "a bar of a library"
    coarse, fine = error_of(reloaded(kept), gptq), error_of(reloaded(gptq), gptq)
    assert coarse > fine, "one scale for a whole row is coarser than one for each 32"


def test_more_bits_are_nearer(qwen: Path, gptq: Kept, tmp_path: Path) -> None:
    eight = make(qwen, tmp_path / "eight", "gptq", "group_size=32", "bits=8", "dtype=float32")
    assert error_of(reloaded(eight), gptq) < error_of(reloaded(gptq), gptq) / 4


def test_by_the_line_with_layers_that_stay(qwen: Path, tmp_path: Path) -> None:
    options = ("group_size=32", "skip_modules=[down_proj]")
    kept, certificate = by_the_line(qwen, tmp_path / "some", "gptq", *options)
    assert 1e-6 < certificate["divergence"]["kl_mean"] < 0.1
    sizes = certificate["footprints"]
    assert sizes["quantized"]["num_parameters"] == sizes["source"]["num_parameters"]
    assert sizes["quantized"]["disk_bytes"] < sizes["source"]["disk_bytes"]
    assert "int4" in sizes["quantized"]["parameters"], "as stored, not as unpacked at first use"
    assert kept.made.findings["num_layers"] == 6
    for versions in (certificate["versions"], read_record(kept.folder).versions):
        assert versions["llmcompressor"] == metadata.version("llmcompressor")
        assert versions["compressed-tensors"] == metadata.version("compressed-tensors")
    assert (
        "Options: `group_size=32`, `skip_modules=[down_proj]`"
        in (kept.folder / "README.md").read_text()
    )
    model = AutoModelForCausalLM.from_pretrained(kept.folder)
    source = kept.reference().model.layers[0].mlp.down_proj.weight
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight.float(), source)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_what_it_cannot_take_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    odd = build(tmp_path / "odd", "llama", intermediate_size=72)
    with pytest.raises(ModelError, match=r"group_size=64 does not divide .*down_proj has 72 .*=8 "):
        check(odd, name)
    gpt2 = build(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ModelError, match=r"Conv1D .*gguf:TYPE"):
        check(gpt2, name)
    experts = build(
        tmp_path / "experts",
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    )
    with pytest.raises(ModelError, match="experts"):
        check(experts, name)
    with pytest.raises(RecipeError, match="group_size"):
        check(odd, name, "group_size=0")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gptq", "gemma3_text"), ("awq", "gemma3_text"), ("gptq", "olmo2"), ("awq", "qwen3")],
)
def test_other_architectures_are_quantized(name: str, kind: str, tmp_path: Path) -> None:
    """Norms plus one, norms of queries: scaled back rightly where awq scales them."""
    kept = make(build(tmp_path / "source", kind), tmp_path / "made", name, "group_size=16")
    assert kept.made.findings["num_layers"] == 7
    assert 0.001 < error_of(reloaded(kept), kept) < 1.1 * error_of(rounded(kept, 16), kept)


def test_awq_must_know_the_architecture(tmp_path: Path) -> None:
    olmo = build(tmp_path / "olmo", "olmo2")
    check(olmo, "gptq")
    with pytest.raises(ModelError, match=r"Olmo2ForCausalLM .*gptq takes"):
        check(olmo, "awq")


def test_a_missing_extra_is_told(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.EXTRAS, "gptq", ("no_such_module_here",))
    with pytest.raises(HardwareError, match=r"pip install 'qlora-kit\[gptq\]'"):
        check(qwen, "gptq")
