"""Every method on the demo model: reloaded, and as near to it as was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_kit.artifact.record import verify_artifact
from qlora_kit.model.demo import DEMO_MODEL
from qlora_kit.quantize.calibration import CalibrationSpec
from qlora_kit.quantize.held_out import Named
from qlora_kit.quantize.quantize import Request, quantize
from qlora_kit.recipe import ModelSpec

NUM_PARAMETERS = 134_515_008


@dataclass(frozen=True)
class Expected:
    """With room above docs/quantization.md and docs/quantize-methods.md."""

    max_kl: float
    """In nats per token."""
    max_megabytes: int
    options: tuple[str, ...] = ()
    is_calibrated: bool = False
    module: str = "torch"
    """What it needs."""


EXPECTED = {
    "nf4": Expected(0.9, 180),
    "fp4": Expected(2.0, 180),
    "llm-int8": Expected(0.1, 230),
    "int8": Expected(0.012, 230),
    "int8, activations": Expected(3.0, 230, ("activations=static",), is_calibrated=True),
    "gptq": Expected(0.7, 185, is_calibrated=True, module="llmcompressor"),
    "awq": Expected(0.7, 185, ("grid=3",), is_calibrated=True, module="llmcompressor"),
    "gguf:Q8_0": Expected(0.03, 150, module="llama_cpp"),
    "gguf:Q4_K_M": Expected(0.3, 110, module="llama_cpp"),
    "onnx": Expected(1e-6, 560, module="onnxruntime"),
    "onnx:int8-dynamic": Expected(2.0, 240, module="onnxruntime"),
    "onnx:int8-static": Expected(2.0, 240, is_calibrated=True, module="onnxruntime"),
}


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", list(EXPECTED))
def test_demo_model_comes_back_near_what_it_was(name: str, tmp_path: Path) -> None:
    expected = EXPECTED[name]
    pytest.importorskip(expected.module)
    request = Request(
        ModelSpec(name_or_path=DEMO_MODEL),
        name.partition(",")[0],
        tmp_path / "out",
        expected.options,
        texts=Named("demo/commands" if expected.is_calibrated else None, None),
        calibration=CalibrationSpec(num_tokens=1024),
        max_tokens=600,
    )
    certificate = quantize(request)
    figures, footprint = certificate["divergence"], certificate["footprints"]["quantized"]
    assert figures["num_tokens"] == 600
    assert 0 < figures["kl_mean"] < expected.max_kl
    assert footprint["disk_bytes"] < expected.max_megabytes * 1e6
    assert footprint["num_parameters"] == NUM_PARAMETERS
    assert verify_artifact(tmp_path / "out") == ()
