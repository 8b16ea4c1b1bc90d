"""Every method of this room on the demo model: reloaded, and as near to it as was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.artifact.record import verify_artifact
from qlora_kit.model.demo import DEMO_MODEL
from qlora_kit.quantize.calibration import CalibrationSpec
from qlora_kit.quantize.held_out import Named
from qlora_kit.quantize.quantize import Request, quantize
from qlora_kit.recipe import ModelSpec

# The largest KL in nats per token, with room above docs/quantize-methods.md, and megabytes.
EXPECTED = {
    "nf4": ((), 0.9, 180),
    "fp4": ((), 2.0, 180),
    "llm-int8": ((), 0.1, 230),
    "int8": ((), 0.012, 230),
    "int8, activations": (("activations=static",), 3.0, 230),
}


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.parametrize("name", list(EXPECTED))
def test_demo_model_comes_back_near_what_it_was(name: str, tmp_path: Path) -> None:
    options, max_kl, max_megabytes = EXPECTED[name]
    request = Request(
        ModelSpec(name_or_path=DEMO_MODEL),
        name.partition(",")[0],
        tmp_path / "out",
        options,
        texts=Named("demo/commands" if options else None, None),
        calibration=CalibrationSpec(num_tokens=1024),
        max_tokens=600,
    )
    certificate = quantize(request)
    figures = certificate["divergence"]
    assert figures["num_tokens"] == 600
    assert 0 < figures["kl_mean"] < max_kl
    assert certificate["footprints"]["quantized"]["disk_bytes"] < max_megabytes * 1e6
    assert certificate["footprints"]["quantized"]["num_parameters"] == 134_515_008
    assert verify_artifact(tmp_path / "out") == ()
