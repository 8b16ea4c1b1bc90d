"""One unit at a time: against a plain loop, and everything put back as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.model.base import Base
from qlora_kit.quantize.rounding import Rounding, image_of
from qlora_kit.quantize.sensitivity.exact import measure_units
from qlora_kit.quantize.sensitivity.measure import reference_of
from qlora_kit.quantize.sensitivity.reference import replaced
from qlora_kit.quantize.sensitivity.units import Unit, block_of, kind_of, units_of
from qlora_kit.report.reporter import Progress

from .wide_models import another, load, some_rows, wide_llama

NF4 = Rounding()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load(wide_llama(tmp_path_factory.mktemp("wide")))


def plain_kl(
    model: torch.nn.Module, change: Callable[[], None], rows: Sequence[TokenSequence]
) -> float:
    """KL by a loop over rows, one at a time; `change` is made to the model in between."""

    def said(row: TokenSequence) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        kept = [p - 1 for p, label in enumerate(row.labels) if p and label != IGNORE_INDEX]
        return torch.log_softmax(logits[kept].double(), dim=-1)

    before = [said(row) for row in rows]
    change()
    after = [said(row) for row in rows]
    kls = [(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]
    return float(torch.cat(kls).mean())


def test_costs_are_those_of_a_plain_loop(base: Base) -> None:
    rows = some_rows()
    units = units_of(base.skeleton.linear_modules, "layer")
    with reference_of(base, rows) as reference:
        assert reference.reuses_blocks
        costs = measure_units(reference, units, NF4, Progress())
    assert [cost.unit for cost in costs] == list(units)
    for cost in (costs[0], costs[9], costs[-1]):
        layer = base.model.get_submodule(cost.unit.name)
        kept = layer.weight.data

        def change(layer: torch.nn.Module = layer) -> None:
            layer.weight.data = image_of(layer, NF4)

        assert cost.kl == pytest.approx(plain_kl(base.model, change, rows), rel=1e-4)
        layer.weight.data = kept


@pytest.mark.parametrize("by", ["kind", "block"])
def test_units_are_replaced_together(base: Base, by: str) -> None:
    rows = some_rows()
    unit = units_of(base.skeleton.linear_modules, by)[-1]  # type: ignore[arg-type]
    assert len(unit.modules) == {"kind": 3, "block": 7}[by]
    layers = [base.model.get_submodule(name) for name in unit.modules]
    kept = [layer.weight.data for layer in layers]
    with reference_of(base, rows) as reference:
        (cost,) = measure_units(reference, [unit], NF4, Progress())

    def change() -> None:
        for layer in layers:
            layer.weight.data = image_of(layer, NF4)

    assert cost.kl == pytest.approx(plain_kl(base.model, change, rows), rel=1e-4)
    for layer, weight in zip(layers, kept, strict=True):
        layer.weight.data = weight


def test_every_weight_is_the_very_tensor_that_it_was(base: Base) -> None:
    pointers = {name: p.data_ptr() for name, p in base.model.named_parameters()}
    copies = {name: p.clone() for name, p in base.model.named_parameters()}
    children = list(base.model.model.layers)
    with reference_of(base, some_rows()) as reference:
        measure_units(reference, units_of(base.skeleton.linear_modules, "layer"), NF4, Progress())
    for name, parameter in base.model.named_parameters():
        assert parameter.data_ptr() == pointers[name]
        assert torch.equal(parameter, copies[name])
    assert list(base.model.model.layers) == children
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())


def test_weights_come_back_after_a_failure(base: Base) -> None:
    name = base.skeleton.linear_modules[0]
    layer = base.model.get_submodule(name)
    before = layer.weight.data_ptr()
    with pytest.raises(KeyError), replaced(base.model, {name: torch.zeros_like(layer.weight)}):
        raise KeyError
    assert layer.weight.data_ptr() == before


def test_blocks_that_have_not_changed_are_not_run(base: Base) -> None:
    """The first of three blocks is run for a change in it, and for none in the others."""
    calls = []
    handle = base.model.model.layers[0].register_forward_hook(lambda *given: calls.append(1))
    with reference_of(base, some_rows()) as reference:
        calls.clear()
        for number in range(3):
            name = f"model.layers.{number}.mlp.up_proj"
            measure_units(reference, [Unit(name, (name,))], NF4, Progress())
    handle.remove()
    assert len(calls) == 1


NEW = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
OTHERS = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma3_text": {**NEW, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
    "gpt_neox": NEW,
    "qwen2": {**NEW, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_architectures_say_the_same_with_blocks_passed_over(
    model_type: str, tmp_path: Path
) -> None:
    base = load(another(tmp_path, model_type, **OTHERS[model_type]))
    rows = some_rows(3, 16)
    last = base.skeleton.linear_modules[-1]
    layer = base.model.get_submodule(last)
    with reference_of(base, rows) as reference:
        assert reference.reuses_blocks
        (cost,) = measure_units(reference, [Unit(last, (last,))], Rounding("int4"), Progress())

    def change() -> None:
        layer.weight.data = image_of(layer, Rounding("int4"))

    assert cost.kl > 0
    assert cost.kl == pytest.approx(plain_kl(base.model, change, rows), rel=1e-3)


def test_names_are_taken_apart_at_the_block() -> None:
    assert block_of("model.layers.3.self_attn.q_proj") == "model.layers.3"
    assert kind_of("model.layers.3.self_attn.q_proj") == "self_attn.q_proj"
    assert block_of("model.decoder.project_in") == "–"
    assert kind_of("model.decoder.project_in") == "model.decoder.project_in"
    names = [f"h.{block}.{kind}" for block in range(2) for kind in ("a", "b.c")]
    assert [unit.name for unit in units_of(names, "kind")] == ["a", "b.c"]
    assert units_of(names, "block")[1] == Unit("h.1", ("h.1.a", "h.1.b.c"))
