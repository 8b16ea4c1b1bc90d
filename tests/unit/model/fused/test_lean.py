"""MLPs and norms that keep less, against their own code: outputs, gradients, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit.memory.kept import measure_kept, recomputing_layers
from qlora_kit.model.fused.attach import fused, plan_fusion
from qlora_kit.model.fused.lean import LeanParts, lean, looking_for_lean_parts
from qlora_kit.model.fused.norm import KINDS
from qlora_kit.model.fused.remade import Origins

from ..zoo import COMMON, DENSE, MIXTURES

IDS = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(0))
TWO_LAYERS = (
    "gpt2: Conv1D, tied",
    "gpt-neo",
    "gpt-neox: fused QKV",
    "gpt-j: head with a bias",
    "phi",
    "phi3: fused QKV and gate",
    "starcoder2",
    "glm4",
    "nemotron: norm plus one",
)
GATED = ("llama, untied", "qwen2: biases", "gemma: norm plus one", "gemma2: soft caps", "olmo2")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def adapted(name: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Any:
    """A tiny model whose norms scale and whose adapter does something."""
    kind, values = {**DENSE, **MIXTURES}[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **COMMON, **values), dtype=dtype
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.requires_grad_(False)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
    model = get_peft_model(model, config).train()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.float()
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def found_in(model: Any) -> LeanParts:
    model.eval()
    with looking_for_lean_parts(model) as seen, torch.no_grad():
        model(input_ids=IDS[:, :6], use_cache=False)
    model.train()
    return seen.parts


def outcome(model: Any, dtype: torch.dtype = torch.float32) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    (loss * 1024).backward()  # as a scaler does, above float16's smallest numbers
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


def require_same(found: Any, wanted: Any, tolerance: float) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in found[1].items():
        size = float(wanted[1][name].norm())
        assert float((gradient - wanted[1][name]).norm()) <= tolerance * size, name


def require_equal(found: Any, wanted: Any) -> None:
    """To the bit."""
    assert found[0] == wanted[0]
    assert found[1].keys() == wanted[1].keys()
    assert all(torch.equal(found[1][name], one) for name, one in wanted[1].items())


@contextmanager
def all_fused(model: Any, parts: LeanParts) -> Iterator[None]:
    fusion = plan_fusion(model, lambda: model(input_ids=IDS[:, :5]))
    origins = Origins()
    with fused(model, fusion, origins), lean(model, parts, origins):
        yield


@pytest.mark.parametrize(("dropout", "recomputes"), [(0.0, False), (0.3, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GATED)
def test_they_compute_what_their_own_code_does(
    name: str, dtype: torch.dtype, dropout: float, recomputes: bool
) -> None:
    model = adapted(name, dtype, dropout)
    parts = found_in(model)
    assert len(parts.mlps) == 2
    assert len(parts.norms) >= 5
    if recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wanted = outcome(model, dtype)
    with lean(model, LeanParts(mlps=parts.mlps), Origins()):
        alone = outcome(model, dtype)
    assert alone[0] == wanted[0], "an MLP gives the same bits"
    assert all(torch.equal(alone[1][key], one) for key, one in wanted[1].items())
    with lean(model, LeanParts(norms=parts.norms), Origins()):
        alone = outcome(model, dtype)
    assert alone[0] == wanted[0], "and so does a norm, forward"
    require_same(alone, wanted, TOLERANCE[dtype])
    with all_fused(model, parts):
        require_same(outcome(model, dtype), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize(("dropout", "recomputes"), [(0.0, False), (0.3, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TWO_LAYERS)
def test_mlps_of_two_layers_and_layer_norms_give_the_same_bits(
    name: str, dtype: torch.dtype, dropout: float, recomputes: bool
) -> None:
    """Also where the first layer makes gate and up; GPT-2's dropout draws the same."""
    model = adapted(name, dtype, dropout)
    parts = found_in(model)
    assert len(parts.mlps) == 2
    has_layer_norms = not name.startswith(("phi3", "glm4", "nemotron"))
    assert bool(parts.layer_norms) == has_layer_norms
    if recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wanted = outcome(model, dtype)
    for some in (LeanParts(mlps=parts.mlps), LeanParts(layer_norms=parts.layer_norms)):
        with lean(model, some, Origins()):
            require_equal(outcome(model, dtype), wanted)
    with all_fused(model, LeanParts()):
        wanted = outcome(model, dtype)
    with all_fused(model, LeanParts(mlps=parts.mlps, layer_norms=parts.layer_norms)):
        require_equal(outcome(model, dtype), wanted)


@pytest.mark.parametrize("name", TWO_LAYERS)
def test_they_keep_less(name: str) -> None:
    model = adapted(name)
    parts = found_in(model)

    def run(length: int) -> torch.Tensor:
        ids = IDS[:1].repeat(1, 4)[:, :length]
        loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    kept = []
    for some in (LeanParts(), LeanParts(mlps=parts.mlps), parts):
        with all_fused(model, some):
            kept.append(measure_kept(model, run).peak_bytes(0, (64,)))
    wide = 4 * 64 * 128 * 2  # an activation of each layer, at least
    assert kept[0] - kept[1] >= wide
    assert kept[2] <= kept[1]
    if parts.layer_norms and not name.startswith("gpt2"):  # whose Conv1D are PEFT's to compute
        assert kept[2] < kept[1]


@pytest.mark.parametrize("name", [*DENSE, "qwen3-moe, one dense layer"])
def test_what_is_found_in_other_architectures_computes_the_same(name: str) -> None:
    model = adapted(name)
    parts = found_in(model)
    wanted = outcome(model)
    with lean(model, parts, Origins()):
        require_same(outcome(model), wanted, 3e-5)
    assert all("forward" not in vars(one) for one in model.modules())


def test_what_only_looks_like_it_is_left_alone() -> None:
    """A factor of its own, and dropout that a trial in evaluation would not show."""

    class Scaled(nn.Module):
        def __init__(self, factor: float, p: float):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
            self.down_proj, self.act_fn = nn.Linear(16, 8), nn.SiLU()
            self.factor, self.p = factor, p

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x) * self.factor
            return self.down_proj(nn.functional.dropout(inner, self.p, self.training))

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8), requires_grad=False)
            self.eps = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.layer_norm(x, (8,), self.weight, None, self.eps)

    model = nn.Sequential(Scaled(1.0, 0.0), Scaled(2.0, 0.0), Scaled(1.0, 0.5), Centred())
    model.eval()
    with looking_for_lean_parts(model) as seen:
        model(torch.randn(2, 3, 8))
    assert seen.parts == LeanParts(mlps=("0",))


def test_a_trained_norm_is_left_alone() -> None:
    model = adapted("llama, untied")
    model.get_submodule("base_model.model.model.norm").weight.requires_grad_(True)
    assert len(found_in(model).norms) == 4


def test_all_kinds_of_norms_are_known() -> None:
    kinds = {name: set(found_in(adapted(name)).norms.values()) for name in GATED}
    assert kinds["llama, untied"] == kinds["qwen2: biases"] == {KINDS[0]}
    assert kinds["gemma: norm plus one"] == kinds["gemma2: soft caps"] == {KINDS[1]}
    assert len(kinds["olmo2"]) == 1


def kept_by_a_layer(model: Any) -> float:
    """Floats for each token."""

    def run(length: int) -> torch.Tensor:
        ids = torch.arange(length)[None] % 300
        loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    assert recomputing_layers(model)
    return measure_kept(model, run).layers[1].linear / 4


def test_a_layer_keeps_neither_the_product_nor_what_norms_give() -> None:
    """Of a gated MLP four tensors of its width are kept by its own code, and two here; of norms
    what comes out of two of them is made again.
    """
    model = adapted("llama, untied")
    parts = found_in(model)
    with fused(model, plan_fusion(model, lambda: model(input_ids=IDS[:, :5]))):
        before = kept_by_a_layer(model)
    with all_fused(model, parts):
        after = kept_by_a_layer(model)
    width, hidden = 128, 64
    assert before - after >= 2 * width + 2 * hidden - 4


def test_what_is_made_again_is_made_under_the_same_autocast() -> None:
    """As of GELU's tanh form, of which a GPU computes the powers in float32 under autocast."""
    seen: list[bool] = []

    class Activation(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return nn.functional.silu(x)

    for name in ("phi", "llama, untied"):
        model = adapted(name, torch.bfloat16)
        parts = found_in(model)
        mlps = [model.get_submodule(one) for one in parts.mlps]
        for mlp in mlps:
            setattr(mlp, "activation_fn" if name == "phi" else "act_fn", Activation())
        seen.clear()
        with all_fused(model, LeanParts(mlps=parts.mlps)):
            seen.clear()
            outcome(model, torch.bfloat16)
        assert len(seen) == 3 * len(mlps), "forward, for its gradient and for that of the next"
        assert all(seen)
        seen.clear()
        outcome(model)
        assert not any(seen)


def test_a_layer_norm_without_a_bias_is_found() -> None:
    """It looks like an RMSNorm, and is none."""
    model = adapted("mpt")
    assert found_in(model).layer_norms
    wanted = outcome(model)
    with lean(model, found_in(model), Origins()):
        require_equal(outcome(model), wanted)
