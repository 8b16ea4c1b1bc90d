"""The probes that compute, in every dtype that a machine may choose."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.doctor import probes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_four_bit_layer_is_what_it_should_be(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_device_and_dtype", lambda: ("cpu", dtype))
    found = probes.four_bit()
    assert found.weight_error == pytest.approx(0.092, abs=0.005)
    assert found.forward_error < 0.01
    assert found.backward_error < 0.01
