"""What a recipe computes by itself where a CPU has bfloat16 units; other tests are in float32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_kit import environment
from qlora_kit.environment import probe_hardware
from qlora_kit.model.manifest import MANIFEST_FILE

from .conftest import Call, write_recipe

_WIDE = "bfloat16, norms in float32, trained in bf16"


@pytest.fixture(autouse=True)
def _in_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("QLORA_KIT_CPU_BFLOAT16", raising=False)
    # Beside other tests a product takes longer than alone.
    monkeypatch.setattr(environment, "_NATIVE_BF16_MAX_SLOWDOWN", 1.5)
    probe_hardware.cache_clear()
    if not probe_hardware().native_bf16:
        probe_hardware.cache_clear()
        pytest.skip("this CPU has no bfloat16 units")
    yield
    probe_hardware.cache_clear()


@pytest.mark.parametrize(
    ("norms", "said"), [("auto", "bfloat16, trained in bf16"), ("true", _WIDE)]
)
def test_whole_line(norms: str, said: str, tiny_llama: Path, tmp_path: Path, call: Call) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    ended = call("train", str(recipe), f"quantization.upcast_norms={norms}")
    assert ended.code == 0, ended.err
    assert f"compute   {said}" in ended.out
    (shortcuts,) = (line for line in ended.out.splitlines() if line.startswith("shortcuts"))
    for taken in ("supervised places", "14 LoRA layers", "2 MLPs", "5 norms", "rotary"):
        assert taken in shortcuts
    assert (tmp_path / "run/merged/model.safetensors").is_file()
    certificate = json.loads((tmp_path / "run/merged/certificate.json").read_text())
    assert certificate["passed"]
    training = json.loads((tmp_path / "run/summary.json").read_text())["training"]
    assert training["last_loss"] < training["first_loss"] * 0.95


def test_layers_keep_half_where_norms_are_not_wide(
    tiny_llama: Path, tmp_path: Path, call: Call
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    layers = []
    for norms in ("auto", "true"):
        said = call("plan", str(recipe), f"quantization.upcast_norms={norms}", "--json")
        assert said.code == 0, said.err
        layers.append(json.loads(said.out)["moments"]["training"]["bytes"]["activations"])
    assert layers[0] < 0.7 * layers[1]


def test_full_precision_is_had_where_it_is_asked_for(
    tiny_llama: Path, tmp_path: Path, call: Call
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    ended = call("train", str(recipe), "train.precision=fp32", "train.max_steps=2")
    assert ended.code == 0, ended.err
    assert "compute   float32, trained in fp32: train.precision is fp32" in ended.out


def test_a_killed_run_goes_on_to_the_same_bits(
    tiny_llama: Path, tmp_path: Path, call: Call
) -> None:
    kept = tmp_path / "kept"
    recipe = write_recipe(tmp_path, tiny_llama, export={"merge": False})
    # Said, as the processes time it anew, beside other tests.
    said = call("prove-resume", str(recipe), "train.precision=bf16", "--keep", str(kept), "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["holds"]
    manifest = json.loads((kept / "killed" / "adapter" / MANIFEST_FILE).read_text())
    assert manifest["quantization"]["compute_dtype"] == "bfloat16"
