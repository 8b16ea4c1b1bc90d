"""LoRA as one operation against PEFT's layer: outputs, gradients, dropout, and what is left."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.model.fused import linear
from qlora_kit.model.fused.attach import fused, plan_fusion
from qlora_kit.model.fused.products import BY_ONEDNN, BY_TORCH, reordered, why_no_reordered
from qlora_kit.model.fused.residents import Residents
from qlora_kit.model.quantized import never_repacked

IDS = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(0))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("biased"), attention_bias=True)


def adapted(base: Path, dtype: torch.dtype = torch.float32, bits: int = 4, **lora: Any) -> Any:
    quantization = {
        4: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        8: BitsAndBytesConfig(load_in_8bit=True),
        16: None,
    }[bits]
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=quantization
    ).requires_grad_(False)
    never_repacked(model)
    torch.manual_seed(1)
    config = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **lora}
    model = get_peft_model(model, LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def outcome(model: Any, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


def require_same(one: Any, other: Any, tolerance: float) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        size = float(other[1][name].norm())
        assert size > 0, name
        assert float((gradient - other[1][name]).norm()) <= tolerance * size, name


def plan(model: Any) -> Any:
    return plan_fusion(model, lambda: model(input_ids=IDS[:, :5]))


def require_same_when_fused(model: Any, dtype: torch.dtype, recomputes: bool) -> Any:
    """What it is without."""
    fusion = plan(model)
    if recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wanted = outcome(model, dtype)
    with fused(model, fusion):
        found = outcome(model, dtype)
    require_same(found, wanted, TOLERANCE[dtype])
    return wanted


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_what_peft_computes(
    base: Path, dtype: torch.dtype, bits: int, dropout: float, recomputes: bool
) -> None:
    """Dropout included: the same numbers are drawn in the same order."""
    model = adapted(base, dtype, bits, lora_dropout=dropout)
    wanted = require_same_when_fused(model, dtype, recomputes)
    again = outcome(model, dtype)
    assert again[0] == wanted[0], "and afterwards all is PEFT's again"


def test_layers_that_share_an_input_are_one_operation(base: Path) -> None:
    fusion = plan(adapted(base))
    first = [group for group in fusion.groups if ".layers.0." in group[0]]
    names = [tuple(name.rpartition(".")[2] for name in group) for group in first]
    assert names == [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]
    assert fusion.num_layers == 14
    assert not fusion.left


def test_a_weight_is_unpacked_once_in_each_direction(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(base)
    fusion = plan(model)
    unpacked: list[torch.dtype] = []
    own = linear.FrozenLinear.weight

    def counted(self: Any, dtype: torch.dtype) -> torch.Tensor:
        unpacked.append(dtype)
        return own(self, dtype)

    monkeypatch.setattr(linear.FrozenLinear, "weight", counted)
    with fused(model, fusion):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        assert len(unpacked) == 14
        loss.backward()
    # Nothing is trained before the first layer, so its own input has no gradient.
    assert len(unpacked) == 28 - 3


def test_the_last_product_of_a_layer_is_not_made_again_where_it_recomputes(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is kept is there before it, and nothing behind it needs its result."""
    model = adapted(base)
    fusion = plan(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    unpacked: list[Any] = []
    own = linear.FrozenLinear.weight

    def counted(self: Any, dtype: torch.dtype) -> torch.Tensor:
        unpacked.append(self.module)
        return own(self, dtype)

    monkeypatch.setattr(linear.FrozenLinear, "weight", counted)
    with fused(model, fusion):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    layers = model.base_model.model.model.layers
    times = [unpacked.count(one.mlp.down_proj.base_layer) for one in layers]
    assert times == [2, 2], "forward and backward"
    assert [unpacked.count(one.mlp.up_proj.base_layer) for one in layers] == [3, 3]


def test_what_is_kept_is_given_back_during_the_backward_pass(base: Path) -> None:
    """Also where the graph lives on, as a loss does that is still to be logged."""
    model = adapted(base)
    kept: list[weakref.ref[torch.Tensor]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        kept.append(weakref.ref(copy))
        return copy

    with (
        fused(model, plan(model)),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one),
    ):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        assert any(one() is not None for one in kept)
        loss.backward()
    assert all(one() is None for one in kept)
    assert loss.grad_fn is not None


def test_inputs_that_are_other_tensors_are_not_mixed_up(base: Path) -> None:
    """A layer of a group that is given something else computes by itself."""
    model = adapted(base)
    attention = model.base_model.model.model.layers[0].self_attn
    one, other = torch.randn(2, 4, 64), torch.randn(2, 4, 64)
    wanted = attention.q_proj(one), attention.k_proj(other), attention.k_proj(one)
    with fused(model, plan(model)):
        found = attention.q_proj(one), attention.k_proj(other), attention.k_proj(one)
    for left, right in zip(found, wanted, strict=True):
        assert torch.allclose(left, right, atol=1e-6)


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj"]])
def test_results_may_be_written_to(base: Path, targets: Any) -> None:
    """With an adapter and without one; as OLMo clamps queries in place. Nor need there be any."""
    model = adapted(base, target_modules=targets)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 4, 64)

    def outcome(clamp: Callable[..., torch.Tensor]) -> Any:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(clamp(layer(leaf), -0.3, 0.3).square().sum(), leaf)[0]

    wanted = outcome(torch.clamp)  # bitsandbytes' own result is a view, and not to be written to
    with fused(model, plan(model)):
        found = outcome(torch.clamp_)
        assert layer(x[:0]).shape == (0, 4, 64)
        assert torch.allclose(layer.forward(x), layer.forward(x=x), atol=1e-6)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_base_with_its_adapter_off_is_the_base(base: Path) -> None:
    model = adapted(base).eval()
    with torch.no_grad(), model.disable_adapter():
        wanted = model(input_ids=IDS).logits
        with fused(model, plan(model)):
            found = model(input_ids=IDS).logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("bits", "lora", "why"),
    [
        (4, {"use_dora": True}, "DoRA"),
        (8, {}, "Linear8bitLt"),
        (16, {"lora_bias": True}, "a bias of its own"),
    ],
)
def test_what_is_not_covered_stays_with_peft(
    base: Path, bits: int, lora: dict[str, Any], why: str
) -> None:
    model = adapted(base, bits=bits, **lora)
    fusion = plan(model)
    assert fusion.groups == ()
    ((reason, count),) = fusion.left.items()
    assert why in reason
    assert count == 14


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("lora", [{"target_modules": ["q_proj", "v_proj"]}, {"use_dora": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_layers_by_themselves_are_what_bitsandbytes_computes(
    base: Path, dtype: torch.dtype, lora: dict[str, Any], recomputes: bool
) -> None:
    """Those without an adapter, and those inside of layers that are left to PEFT."""
    require_same_when_fused(adapted(base, dtype, **lora), dtype, recomputes)


@pytest.mark.parametrize("lora", [{"target_modules": ["q_proj", "v_proj"]}, {"use_dora": True}])
def test_their_weights_stay_where_there_is_room(
    base: Path, lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(base, **lora)
    unpacked: list[Any] = []
    own = linear.FrozenLinear._unpacked

    def counted(self: Any, dtype: torch.dtype) -> torch.Tensor:
        unpacked.append(self.module)
        return own(self, dtype)

    monkeypatch.setattr(linear.FrozenLinear, "_unpacked", counted)
    with fused(model, plan(model), residents=Residents(1 << 30)):
        first = outcome(model, torch.float32)
        assert len(unpacked) == len(set(unpacked)) == 14
        again = outcome(model, torch.float32)
    assert len(unpacked) == 14
    assert again[0] == first[0]


def test_on_another_device_frozen_layers_stay_as_they_are(base: Path) -> None:
    """On a GPU no weight stays, and bitsandbytes multiplies a few rows with packed ones."""
    model = adapted(base, target_modules=["q_proj", "v_proj"])
    fusion = plan(model)
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    here, elsewhere = [mlp.gate_proj], [mlp.up_proj]
    assert all(type(one).__name__ == "Linear4bit" for one in (*here, *elsewhere))
    for layer in elsewhere:
        packed: Any = nn.Parameter(layer.weight.data.to("meta"), requires_grad=False)
        packed.quant_state = layer.weight.quant_state
        layer.weight = packed
    for products in (BY_TORCH, BY_ONEDNN):
        with fused(model, fusion, products=products):
            assert all("forward" in one.__dict__ for one in here)
            assert all("forward" not in one.__dict__ for one in elsewhere)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "v_proj"]}])
def test_by_onednn_it_is_what_peft_computes(
    base: Path, lora: dict[str, Any], recomputes: bool
) -> None:
    model = adapted(base, **lora)
    if recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wanted = outcome(model, torch.float32)
    with fused(model, plan(model), products=BY_ONEDNN):
        found = outcome(model, torch.float32)
    require_same(found, wanted, 1e-5)


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "v_proj"]}, {"use_dora": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reordered_weights_that_stay_give_the_same_bits(
    base: Path, lora: dict[str, Any], dtype: torch.dtype
) -> None:
    """Of the frozen layers, the head's included, both directions stay; of the first layer's q, k
    and v the forward one alone.
    """
    if why_no_reordered(torch.device("cpu"), dtype) is not None:
        pytest.skip("no bfloat16 in this processor")
    model = adapted(base, dtype, **lora)
    products = BY_ONEDNN if dtype == torch.float32 else BY_TORCH
    with fused(model, plan(model), products=products):
        wanted = outcome(model, dtype)
    residents = Residents(1 << 30, reordered)
    with fused(model, plan(model), residents=residents, products=products):
        for _ in range(2):
            found = outcome(model, dtype)
            assert found[0] == wanted[0]
            require_same(found, wanted, 0.0)
    directions = Counter(is_transposed for _, _, is_transposed in residents._reordered)
    assert directions[False] == 15
    assert directions[True] >= 12


def test_rslora_and_ranks_of_their_own(base: Path) -> None:
    model = adapted(
        base, use_rslora=True, rank_pattern={"k_proj": 2, "up_proj": 5}, alpha_pattern={"v_proj": 3}
    )
    wanted = outcome(model, torch.float32)
    with fused(model, plan(model)):
        found = outcome(model, torch.float32)
    require_same(found, wanted, 1e-5)


def test_it_keeps_less_than_peft(base: Path) -> None:
    """And no unpacked weight: what is kept depends on the tokens alone."""
    from qlora_kit.memory.kept import measure_kept

    model = adapted(base)

    def run(length: int) -> Any:
        ids = torch.arange(length)[None] % 300
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.gradient_checkpointing_disable()
    by_peft = measure_kept(model, run)
    with fused(model, plan(model)):
        by_one = measure_kept(model, run)
    assert by_one.layers[1].linear <= by_peft.layers[1].linear
    assert by_one.layers[1].constant == pytest.approx(0, abs=64)


def test_a_copy_is_as_the_model_was(base: Path) -> None:
    """Nothing of it is left on the layers, so that the model can be saved and copied."""
    model = adapted(base)
    with fused(model, plan(model)):
        pass
    twin = copy.deepcopy(model)
    assert all("forward" not in one.__dict__ for one in twin.modules())
