"""What weights say before anything is run, against values planted or worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit.errors import ModelError
from qlora_kit.quantize.rounding import Rounding
from qlora_kit.quantize.sensitivity.statistics import layer_statistics
from qlora_kit.quantize.sensitivity.stored import stored_statistics
from qlora_kit.recipe import ModelSpec

from .wide_models import another, wide_llama

NF4 = Rounding()
SINGLE = Rounding("nf4", 64, False)


def normal(seed: int = 0) -> torch.Tensor:
    return torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_a_normal_matrix_is_nothing_to_speak_of() -> None:
    found = layer_statistics("w", normal(), NF4)
    assert (found.num_out, found.num_in) == (128, 128)
    assert found.absmax == pytest.approx(float(normal().abs().max()))
    assert found.kurtosis == pytest.approx(0, abs=0.15)
    assert found.num_outlier_columns == 0
    assert found.saturation == 0
    assert found.error == pytest.approx(0.092, abs=0.004)  # NF4 on N(0, σ), blocks of 64
    assert list(found.findings()) == []


def test_kurtosis_is_the_fourth_moment() -> None:
    """Of ±1: m4 / m2² - 3 = -2; of a Laplace distribution 3."""
    signs = torch.ones(64, 64)
    signs[:, ::2] = -1
    assert layer_statistics("w", signs, NF4).kurtosis == pytest.approx(-2)
    torch.manual_seed(0)
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((400, 400))
    assert layer_statistics("w", laplace, NF4).kurtosis == pytest.approx(3, abs=0.2)


def test_columns_that_stand_out_are_counted() -> None:
    weight = normal()
    weight[:, [3, 77]] *= 8
    assert layer_statistics("w", weight, NF4).num_outlier_columns == 2


def test_clipped_weights_are_noticed() -> None:
    weight = normal().clamp(-0.03, 0.03)
    found = layer_statistics("w", weight, NF4)
    clipped = int((normal().abs() >= 0.03).sum())
    assert found.saturation == pytest.approx((clipped - 1) / 128**2)
    assert "clipped" in next(found.findings())


def test_double_quantization_spreads_the_damage_of_an_outlier() -> None:
    """One weight at 1000σ: rows that share its group of scales are three to four times worse."""
    weight = normal()[:64, :64].clone()
    weight[5, 5] = 20.0
    found = layer_statistics("w", weight, NF4)
    assert found.num_damaged_rows >= 60
    assert found.damaged_error is not None
    single, double = found.damaged_error
    assert single == pytest.approx(0.092, abs=0.02)
    assert double > 0.25
    (words,) = found.findings()
    assert "double quantization spreads an outlier" in words
    assert "quantization.overrides" in words
    alone = layer_statistics("w", weight, SINGLE)
    assert alone.num_damaged_rows == 0
    assert list(alone.findings()) == []


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    weight = normal()
    weight[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    found = layer_statistics("w", weight, NF4)
    assert found.num_non_finite == 3
    assert found.error == pytest.approx(0.092, abs=0.004)
    assert "3 numbers that are NaN or infinite" in next(found.findings())
    weight[0, :2] = 0
    alone = layer_statistics("w", weight, NF4)
    assert "holds a number that is NaN or infinite" in next(alone.findings())
    zeros = layer_statistics("w", torch.zeros(8, 64), NF4)
    assert (zeros.absmax, zeros.kurtosis, zeros.saturation, zeros.error) == (0, 0, 0, 0)


class TestOfWhatIsStored:
    def test_nan_are_found_where_loading_refuses(self, tmp_path: Path) -> None:
        folder = wide_llama(tmp_path, 2)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        found = stored_statistics(ModelSpec(name_or_path=str(folder)), NF4)
        assert len(found) == 14
        assert [one.name for one in found if one.num_non_finite] == ["model.layers.1.mlp.up_proj"]

    def test_conv1d_is_turned(self, tmp_path: Path) -> None:
        folder = another(tmp_path, "gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=64)
        found = {
            one.name: one for one in stored_statistics(ModelSpec(name_or_path=str(folder)), NF4)
        }
        layer = found["transformer.h.0.attn.c_attn"]
        assert (layer.num_out, layer.num_in) == (192, 64)

    def test_what_is_quantized_already_is_refused(self, tmp_path: Path) -> None:
        from qlora_kit.recipe import QuantizationSpec

        from .wide_models import load

        base = load(wide_llama(tmp_path / "plain", 1), QuantizationSpec())
        base.model.save_pretrained(tmp_path / "stored")
        with pytest.raises(ModelError, match="stored quantized; take the model in 16 bits"):
            stored_statistics(ModelSpec(name_or_path=str(tmp_path / "stored")), NF4)
