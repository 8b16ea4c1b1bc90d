"""The straight line of `quantize`: what is published, what is refused, and that nothing is left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qlora_kit.artifact.record import read_record, verify_artifact
from qlora_kit.cli import app
from qlora_kit.errors import DataError, HardwareError, ModelError, QloraKitError, RecipeError
from qlora_kit.evaluate.divergence import measure_divergence
from qlora_kit.extras import has_extra
from qlora_kit.quantize import quantize as quantize_module
from qlora_kit.quantize.calibration import CalibrationSpec
from qlora_kit.quantize.held_out import Named
from qlora_kit.quantize.methods import METHODS, resolve_method
from qlora_kit.quantize.options import describe_options, parse_options
from qlora_kit.quantize.quantize import Request, quantize
from qlora_kit.quantize.texts import find_texts, render_texts
from qlora_kit.recipe import ModelSpec
from qlora_kit.runtime.forward import CausalScorer

from .tiny_sources import KINDS, build, logits, reloaded, source_of, text_file

OURS = ("nf4", "fp4", "llm-int8", "int8")
# Plain transformers multiplies 4-bit weights in bfloat16 on some processors, which the kit turns
# off; and LLM.int8() takes out the outliers of a whole batch, so that batches matter.
AGREEMENT = {"nf4": 5e-3, "llm-int8": 0.1, "int8": 1e-3}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "source"
    return build(folder, "llama", {**KINDS["llama"][1], "initializer_range": 0.3})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "rows.jsonl", 24)


def skip_without_extra(method: str) -> None:
    extra = METHODS[method.partition(":")[0]].extra
    if extra and not has_extra(extra):
        pytest.skip(f"what {method} needs is no must")


def asked(model: Path, method: str, out: Path, *options: str, **fields: Any) -> Request:
    spec = ModelSpec(name_or_path=str(model))
    return Request(spec, method, out, options, **fields)


@pytest.mark.parametrize("method", list(AGREEMENT))
def test_certificate_tells_the_distance_of_what_plain_transformers_loads(
    method: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    certificate = quantize(asked(llama, method, out, texts=Named(None, str(text))))
    source = source_of(llama)
    rows = render_texts(find_texts(str(text), "eval"), source.tokenizer).rows[0]
    wanted = measure_divergence(
        CausalScorer(reloaded(llama), 0), CausalScorer(reloaded(out), 0), rows, batch_size=4
    )

    figures = certificate["divergence"]
    assert figures["kl_mean"] == pytest.approx(wanted.kl_mean, rel=AGREEMENT[method])
    assert figures["candidate_perplexity"] == pytest.approx(wanted.candidate_perplexity, rel=5e-3)
    assert 0 < figures["kl_mean"] < 1
    assert certificate["passed"] is True
    sizes = certificate["footprints"]
    assert sizes["quantized"]["disk_bytes"] < 0.6 * sizes["source"]["disk_bytes"]
    assert sizes["quantized"]["num_parameters"] == source.num_parameters
    assert json.loads((out / "certificate.json").read_text()) == certificate


def test_what_is_published_knows_where_it_comes_from(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    request = asked(llama, "int8", out, "activations=static", texts=Named(str(text), None))
    spec = CalibrationSpec(num_tokens=100, max_length=64)
    certificate = quantize(replace(request, calibration=spec))

    record = read_record(out)
    assert record.kind == "int8"
    assert record.made_from.base is not None
    assert record.made_from.base.fingerprint == source_of(llama).fingerprint
    assert record.settings["activations"] == "static"
    assert record.calibration is not None
    assert (record.calibration.num_tokens, record.calibration.seed) == (100, 42)
    assert verify_artifact(out) == ()
    assert certificate["calibration"]["num_tokens"] == 100
    assert certificate["source"]["name"] == "source"  # no path of this machine
    card = (out / "README.md").read_text()
    assert "# source, quantized by int8" in card
    assert "Options: `activations=static`" in card
    assert "import qlora_kit.quantize.int8  # registers it" in card
    assert "base_model" not in card, "the hub knows no such model"
    for folder in (tmp_path, text.parent, llama.parent):
        assert str(folder) not in card
        assert str(folder) not in json.dumps(certificate)
    assert "a fifth of the rows" in certificate["held_out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_result_over_the_budget_is_kept_and_said(llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(llama), "--method", "nf4", "--out", str(out), "--data", str(text)]
    result = CliRunner().invoke(app, [*arguments, "--max-kl", "1e-9"])
    assert result.exit_code == 1
    assert "exceeds the budget of 1e-09" in result.output
    assert (out / "model.safetensors").is_file()


def test_figures_as_json_alone_on_standard_output(llama: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(llama), "--method", "nf4", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(
        app, [*arguments, "block_size=32", "--data", str(text), "--max-kl", "10", "--json"]
    )
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    assert values["options"]["block_size"] == 32
    assert values["passed"] is True


def test_what_is_quantized_already_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    first = tmp_path / "nf4"
    quantize(asked(llama, "nf4", first, texts=Named(None, str(text))))
    with pytest.raises(ModelError, match=r"quantized already .*qlora-kit dequantize"):
        quantize(asked(first, "int8", tmp_path / "out"))


def broken(llama: Path, to: Path) -> Path:
    import shutil

    shutil.copytree(llama, to)
    tensors = load_file(to / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"method": "nf5"}, ModelError, "no method nf5; did you mean nf4"),
        ({"method": "zip"}, ModelError, "there are nf4, fp4, llm-int8, int8"),
        ({"method": "nf4:x"}, ModelError, "nf4 has no variants"),
        ({"method": "gguf"}, ModelError, "gguf needs its TYPE"),
        ({"options": ("blocksize=32",)}, RecipeError, "did you mean block_size"),
        ({"options": ("block_size=48",)}, RecipeError, "must be one of 32, 64, .* got 48"),
        ({"options": ("double_quant",)}, RecipeError, "is not key=value"),
        ({"texts": Named("rows.jsonl", None)}, DataError, "--calibration has no effect"),
        ({"texts": Named(None, "rows.jsonl")}, DataError, r"rows\.jsonl"),
        ({"method": "int8", "options": ("activations=static",)}, DataError, "calibrated on text"),
        ({"method": "int8", "options": ("group_size=32",)}, RecipeError, "granularity=group"),
        ({"out": Path(".")}, QloraKitError, "exists already"),
    ],
)
def test_bad_input_is_one_message_before_the_work(
    fields: dict[str, Any],
    error: type[Exception],
    message: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantize_module, "record_source", lambda *arguments: pytest.fail("worked"))
    request = replace(asked(llama, "nf4", tmp_path / "out"), **fields)
    with pytest.raises(error, match=message):
        quantize(request)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = broken(llama, tmp_path / "broken")
    with pytest.raises(ModelError, match=r"up_proj\.weight: holds NaN"):
        quantize(asked(folder, "int8", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before_the_work(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = replace(resolve_method("nf4"), predict_bytes=lambda source, options: 10**18)
    monkeypatch.setattr(quantize_module, "resolve_method", lambda name: method)
    with pytest.raises(HardwareError, match=r"no room on the disk .* with --out"):
        quantize(asked(llama, "nf4", tmp_path / "out", texts=Named(None, str(text))))
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_fails_leaves_nothing(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(source: Any, options: Any, calibration: Any, draft: Path, reporter: Any) -> Any:
        (draft / "half.bin").write_bytes(b"x")
        raise ModelError("broke off")

    method = replace(resolve_method("nf4"), make=make)
    monkeypatch.setattr(quantize_module, "resolve_method", lambda name: method)
    with pytest.raises(ModelError, match="broke off"):
        quantize(asked(llama, "nf4", tmp_path / "out", texts=Named(None, str(text))))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_comes_back_otherwise_is_not_published(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_kit.quantize import load

    original = load.reload

    def shaken(draft: Path, *arguments: Any) -> Any:
        tensors = load_file(draft / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight_scale"][0] *= 1.01
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        return original(draft, *arguments)

    monkeypatch.setattr(load, "reload", shaken)
    with pytest.raises(ModelError, match="does not come back from the disk"):
        quantize(asked(llama, "int8", tmp_path / "out", texts=Named(None, str(text))))
    assert list(tmp_path.iterdir()) == []


def test_every_fault_of_the_options_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_options(resolve_method("nf4"), ("block_size=3", "doublequant=1", "dtype=int8"))
    assert [fault.path for fault in caught.value.faults] == ["block_size", "dtype", "doublequant"]


@pytest.mark.parametrize(
    "name",
    [*OURS, "gptq", "awq", "gguf:Q4_K_M", "onnx", "onnx:int8-dynamic", "onnx:int8-static"],
)
def test_every_option_is_described(name: str) -> None:
    skip_without_extra(name)
    described = list(describe_options(resolve_method(name).options))
    assert [option for option, _, _ in described] == list(resolve_method(name).options.model_fields)
    assert all(meaning.endswith(".") for _, _, meaning in described)


def test_methods_are_listed_and_described_on_the_command_line() -> None:
    listed = CliRunner().invoke(app, ["quantize", "--methods"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in METHODS)
    told = CliRunner().invoke(app, ["quantize", "--describe", "int8"])
    assert told.exit_code == 0
    assert "ema_decay=0.9" in told.output


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gguf", ("gguf: a GGUF file", "importance=true")),
        ("gguf:Q8_0", ("gguf:Q8_0: a GGUF file", "importance=true")),
        ("onnx", ("onnx: a graph", "It has no options.")),
        ("awq", ("awq: 2 to 8 bits", "bits=4", "grid=20")),
    ],
)
def test_a_family_and_a_method_without_options_are_described(
    name: str, words: tuple[str, ...]
) -> None:
    skip_without_extra(name)
    told = CliRunner().invoke(app, ["quantize", "--describe", name])
    assert told.exit_code == 0
    assert all(word in told.output for word in words), told.output


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_the_summary_names_the_bits_that_the_options_take(name: str) -> None:
    skip_without_extra(name)
    told = METHODS[name].summary.partition(" bits")[0]
    for bits in range(1, 10):
        fits = int(told[0]) <= bits <= int(told[-1])
        if fits:
            parse_options(resolve_method(name), (f"bits={bits}",))
        else:
            with pytest.raises(RecipeError):
                parse_options(resolve_method(name), (f"bits={bits}",))


@pytest.mark.slow
def test_int8_is_run_by_whoever_measures(llama: Path, text: Path, tmp_path: Path) -> None:
    """In a process that has not imported the format: `evaluate` and `compare` load it by name."""
    import subprocess
    import sys

    out = tmp_path / "out"
    quantize(asked(llama, "int8", out, "activations=dynamic", texts=Named(None, str(text))))
    code = (
        "from qlora_kit.runtime.open import open_runtime\n"
        f"print(open_runtime({str(out)!r}).footprint().parameters['int8'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)), done.stderr


@pytest.mark.parametrize(
    ("method", "kind"),
    [("nf4", "gpt2: Conv1D"), ("int8", "qwen2: biases, tied"), ("llm-int8", "gemma3")],
)
def test_other_architectures_go_the_whole_way(
    method: str, kind: str, text: Path, tmp_path: Path
) -> None:
    folder = build(tmp_path / "source", *KINDS[kind])
    out = tmp_path / "out"
    certificate = quantize(asked(folder, method, out, texts=Named(None, str(text))))
    assert certificate["divergence"]["kl_mean"] < 0.1
    assert torch.isfinite(logits(reloaded(out))).all()
