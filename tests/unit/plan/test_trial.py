"""What a trial without numbers says beside what is alive in a step with them."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora import dora

from qlora_kit import kept
from qlora_kit.environment import Hardware, probe_hardware
from qlora_kit.errors import HardwareError
from qlora_kit.memory.kept import Kept, measure_kept
from qlora_kit.memory.live import UNPACKED, LiveTensors
from qlora_kit.memory.optimizer import state_bytes
from qlora_kit.memory.ways import lengths_of_rows
from qlora_kit.model.by_example import attending_by_example
from qlora_kit.model.fused.residents import Residents
from qlora_kit.model.vocabulary import load_vocabulary
from qlora_kit.plan.gpus import GPUS, known_gpu
from qlora_kit.plan.plan import FRAMEWORK, OPTIMIZER, SAVED, Planner
from qlora_kit.plan.rows import train_rows
from qlora_kit.plan.stand_in import dora_with_fewer_holes
from qlora_kit.plan.suggest import suggestions
from qlora_kit.plan.trial import HOLES
from qlora_kit.processes import ALONE
from qlora_kit.recipe import Recipe, load_recipe
from qlora_kit.report.reporter import SILENT
from qlora_kit.stages.prepare import Prepared, prepare
from qlora_kit.train import kernel_race, product_choice
from qlora_kit.train.kernel_race import Raced
from qlora_kit.train.loss_of_length import loss_of_length
from qlora_kit.train.recompute import able_to_recompute, recompute_first
from qlora_kit.train.shortcuts import choose_shortcuts, taken

_GIB = 2**30


def recipe_for(folder: Path, model: Path, **sections: Any) -> Recipe:
    rows = folder / "rows.jsonl"
    texts = [
        {"prompt": f"paint {n}", "completion": "red and blue " * (1 + n % 3)} for n in range(8)
    ]
    rows.write_text("".join(json.dumps(one) + "\n" for one in texts))
    values: dict[str, Any] = {
        "model": {"name_or_path": str(model)},
        "quantization": {"compute_dtype": "float32"},
        "lora": {"r": 8},
        "data": {"train": [{"path": str(rows)}], "max_length": 64, "padding_free": False},
        "train": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        "run_dir": str(folder / "run"),
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values))
    return load_recipe(path)


def alive_in_a_step(ready: Prepared, recipe: Recipe, count: int) -> int:
    """Bytes at the peak of forward and backward on real tensors, which the trial never sees."""
    model = ready.adapted.model
    batch = ready.batches.collator(
        ready.batches.longest(recipe.train.per_device_train_batch_size)  # type: ignore[arg-type]
    )
    given = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    shortcuts = choose_shortcuts(model, recipe.train, "fp32", is_sharded=False)
    live = LiveTensors()
    for module in model.modules():
        live.hold([*module.parameters(False), *module.buffers(False)], "weights")
        weight: Any = dict(module.named_parameters(recurse=False)).get("weight")
        state = getattr(weight, "quant_state", None)
        if state is not None:
            beside = [state.absmax, state.code, state.offset, state.state2.absmax]
            live.hold([*beside, state.state2.code], "weights")
        if type(weight).__name__ == "Int8Params":
            live.hold([module.state.SCB if weight.SCB is None else weight.SCB], "weights")  # type: ignore[union-attr]
        held: Any = getattr(module, "held", None)
        if held is not None and held.codes is not None:
            live.hold([*held.codes.tensors(), *held.made_of], "weights")
    model.train()
    by_example = attending_by_example(model.get_base_model(), ready.batches.by_example)
    residents = Residents(0 if count else 2**30)  # no tiny model has more
    with taken(model, shortcuts, residents), by_example, able_to_recompute(model):
        recompute_first(model, count)
        with live:
            model(**given, use_cache=False).loss.backward()
    return sum(live.peak.values())


def told_and_taken(recipe: Recipe, count: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes of tensors at the peak of a step in which so many layers recompute: by a plan, and on
    real ones.
    """
    ready = prepare(recipe, probe_hardware(), ALONE, SILENT)
    taken = alive_in_a_step(ready, recipe, count)
    vocabulary = load_vocabulary(recipe.model)
    planner = Planner(vocabulary, probe_hardware(), 8 * _GIB)
    monkeypatch.setattr(Kept, "fewest", lambda *_: count)
    plan = planner.plan(recipe, train_rows(recipe, vocabulary))
    assert plan.choice.way.num_recomputing == count
    training = plan.moment("training")
    return training.tensor_bytes - training.components["optimizer"], taken


_FLAT, _PACKED = {"padding_free": True}, {"padding_free": "auto", "packing": True}
_WHOLE = {"load_in_4bit": False}
_EIGHT = {"load_in_8bit": True, "load_in_4bit": False}


@pytest.mark.parametrize(
    ("count", "train", "data", "quantization"),
    [
        (0, {}, {}, {}),
        (2, {}, {}, {}),
        (0, {"fused_loss": False}, {}, {}),
        (0, {"fused_lora": False}, {}, {}),
        (0, {}, _FLAT, {}),
        (1, {}, _FLAT, {}),
        (0, {"per_device_train_batch_size": 8}, _FLAT, {}),
        (0, {}, _PACKED, {}),
        (0, {}, {}, _EIGHT),
        (2, {}, _FLAT, _EIGHT),
    ],
)
def test_a_trial_says_what_a_step_takes(
    count: int,
    train: dict[str, Any],
    data: dict[str, Any],
    quantization: dict[str, Any],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_for(tmp_path, tiny_llama, train=train, data=data, quantization=quantization)
    told, taken = told_and_taken(recipe, count, monkeypatch)
    assert told == pytest.approx(taken, rel=0.02)


@pytest.mark.parametrize("quantization", [{}, _WHOLE], ids=["4 bits", "16 bits"])
@pytest.mark.parametrize("count", [0, 2])
def test_it_knows_what_dora_takes(
    count: int,
    quantization: dict[str, Any],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The norms of unpacked weights, too."""
    lora = {"use_dora": True}
    recipe = recipe_for(tmp_path, tiny_llama, lora=lora, quantization=quantization)
    told, taken = told_and_taken(recipe, count, monkeypatch)
    assert told == pytest.approx(taken, rel=0.02)


def test_a_plan_of_dora_in_8_bits_is_made_for_a_gpu(tiny_llama: Path, tmp_path: Path) -> None:
    """On a CPU PEFT cannot compute it."""
    plans = []
    for use_dora in (False, True):
        recipe = recipe_for(tmp_path, tiny_llama, lora={"use_dora": use_dora}, quantization=_EIGHT)
        vocabulary = load_vocabulary(recipe.model)
        planner = Planner(vocabulary, known_gpu("H100"), 8 * _GIB)
        plans.append(planner.plan(recipe, train_rows(recipe, vocabulary)))
    plain, dora = (one.moment("training").tensor_bytes for one in plans)
    assert dora > plain


@pytest.mark.parametrize("count", [0, 1])
def test_it_knows_what_layers_without_an_adapter_take(
    count: int,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their unpacked weights stay as well."""
    recipe = recipe_for(tmp_path, tiny_llama, lora={"target_modules": ["q_proj", "v_proj"]})
    told, taken = told_and_taken(recipe, count, monkeypatch)
    assert told == pytest.approx(taken, rel=0.02)


@pytest.mark.parametrize("data", [{}, _FLAT, _PACKED])
@pytest.mark.parametrize("quantization", [{}, _EIGHT])
def test_a_plan_counts_what_training_counts(
    data: dict[str, Any], quantization: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """So that both choose the same."""
    recipe = recipe_for(tmp_path, tiny_llama, data=data, quantization=quantization)
    ready = prepare(recipe, probe_hardware(), ALONE, SILENT)
    model, batches = ready.adapted.model, ready.batches
    around: Any = SimpleNamespace(precision="fp32")
    shortcuts = choose_shortcuts(model, recipe.train, "fp32", is_sharded=False)
    by_example = attending_by_example(model.get_base_model(), batches.by_example)
    with taken(model, shortcuts), by_example:
        kept = measure_kept(model, lambda n: loss_of_length(model, batches.collator, n, around))
    vocabulary = load_vocabulary(recipe.model)
    plan = Planner(vocabulary, probe_hardware(), 8 * _GIB).plan(
        recipe, train_rows(recipe, vocabulary)
    )
    longest = batches.longest(recipe.train.per_device_train_batch_size)
    assert list(plan.worst.items) == batches.attended(longest)
    lengths = lengths_of_rows(plan.worst.items)
    for count in (0, 1, 2):
        found = plan.kept.peak_bytes(count, lengths)
        assert found == pytest.approx(kept.peak_bytes(count, lengths), rel=0.01)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the GNU C library")
def test_holes_of_the_heap_are_no_tensors_and_only_on_a_cpu(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, tiny_llama)
    vocabulary = load_vocabulary(recipe.model)
    training = Planner(vocabulary, probe_hardware(), 8 * _GIB).plan(recipe).moment("training")
    beside = training.components[HOLES] + training.components[FRAMEWORK]
    assert training.components[HOLES] > 0
    assert training.tensor_bytes == training.num_bytes - beside
    on_gpu = Planner(vocabulary, known_gpu("T4"), 8 * _GIB).plan(recipe)
    assert not any(HOLES in one.components for one in on_gpu.moments)


@pytest.mark.parametrize(("recomputes", "has_holes"), [(False, True), (True, False)])
def test_a_budget_that_speed_was_given_up_for_leaves_no_holes(
    recomputes: bool, has_holes: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    """As freed blocks go back at once."""
    train = {"memory_budget": "8GiB", "gradient_checkpointing": recomputes}
    recipe = recipe_for(tmp_path, tiny_llama, train=train)
    plan = Planner(load_vocabulary(recipe.model), probe_hardware(), 8 * _GIB).plan(recipe)
    assert (HOLES in plan.moment("training").components) == has_holes


@pytest.mark.parametrize(
    ("train", "is_counted"),
    [
        ({"num_train_epochs": 2}, True),
        ({"num_train_epochs": 1}, False),
        ({"num_train_epochs": 2, "memory_budget": "4GiB"}, False),
    ],
)
def test_a_checkpoint_that_is_written_beside_training_takes_memory_on_a_cpu(
    train: dict[str, Any], is_counted: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    """A copy of what is trained and of two averages of it."""
    recipe = recipe_for(tmp_path, tiny_llama, train=train)
    vocabulary = load_vocabulary(recipe.model)
    components = {}
    for hardware in (probe_hardware(), known_gpu("T4")):
        plan = Planner(vocabulary, hardware, 8 * _GIB).plan(recipe, train_rows(recipe, vocabulary))
        components[hardware.device] = plan.moment("training").components
    on_cpu = components["cpu"]
    assert on_cpu.get(SAVED, 0) == (on_cpu["adapter"] + on_cpu["optimizer"]) * is_counted
    assert SAVED not in components["cuda"]


def test_what_does_not_fit_is_told_what_each_change_saves(tiny_llama: Path, tmp_path: Path) -> None:
    many = {"r": 64}  # so that there are tensors large enough for 8 bits of state
    recipe = recipe_for(tmp_path, tiny_llama, train={"optim": "adamw_torch"}, lora=many)
    planner = Planner(load_vocabulary(recipe.model), known_gpu("T4"), 2**20)
    plan = planner.plan(recipe)
    assert not plan.fits
    found = suggestions(recipe, plan, planner)
    keys = {one.overrides[0].partition("=")[0] for one in found}
    assert {"train.per_device_train_batch_size", "train.optim"} <= keys
    for one in found:
        assert one.saved_bytes > 0
        assert one.peak_bytes <= plan.peak.num_bytes
    together = found[-1]
    assert len(together.overrides) > 2
    assert together.peak_bytes == min(one.peak_bytes for one in found)


@pytest.mark.parametrize("gain", [1.5, 0.9])
def test_weights_stay_as_they_will_in_training(
    gain: float, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In oneDNN's layout, which is twice the bytes, only where that is faster on this machine."""
    monkeypatch.setattr(product_choice, "FEWEST_WEIGHTS", 0)
    monkeypatch.setattr(product_choice, "_known_or_raced", lambda *_: (Raced(gain, 0.0), None))
    recipe = recipe_for(tmp_path, tiny_llama)
    plan = Planner(load_vocabulary(recipe.model), probe_hardware(), 8 * _GIB).plan(recipe)
    assert plan.choice.stays.is_for_reordered == (gain > 1)
    assert plan.choice.stays.num_bytes > 0


def test_weights_that_stay_are_the_same_while_held_out_rows_are_measured(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the head too, which comes behind the worst point; without those of the first layer
    that no gradient asks for.
    """
    monkeypatch.setattr(product_choice, "FEWEST_WEIGHTS", 0)
    monkeypatch.setattr(product_choice, "_known_or_raced", lambda *_: (Raced(1.5, 0.0), None))
    evaluating = {"eval_strategy": "epoch"}
    recipe = recipe_for(tmp_path, tiny_llama, train=evaluating, data={"held_out": 0.5})
    recipe = recipe.model_copy(
        update={"evaluate": recipe.evaluate.model_copy(update={"perplexity": False})}
    )
    plan = Planner(load_vocabulary(recipe.model), probe_hardware(), 8 * _GIB).plan(recipe)
    assert plan.choice.stays.is_for_reordered
    queries_keys_values = 4 * 64 * (64 + 32 + 32)
    evaluation = plan.moment("evaluation").components
    assert evaluation[UNPACKED] == plan.choice.stays.num_bytes - queries_keys_values


def test_a_plan_times_what_training_would(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the race itself, on weights that have numbers, though the plan's have none; once."""
    monkeypatch.setattr(product_choice, "FEWEST_WEIGHTS", 0)
    monkeypatch.setattr(kernel_race, "_BYTES_BEYOND_A_CACHE", 1)
    monkeypatch.setattr(kept, "recall", lambda *_: None)
    found = []
    race = product_choice.raced_or_why

    def raced(*given: Any) -> Any:
        found.append(race(*given))
        return found[-1]

    monkeypatch.setattr(product_choice, "raced_or_why", raced)
    recipe = recipe_for(tmp_path, tiny_llama)
    planner = Planner(load_vocabulary(recipe.model), probe_hardware(), 8 * _GIB)
    for _ in range(2):
        planner.plan(recipe)
    assert [why for _, why in found] == [None] * len(found)
    assert 0 < len(found) <= 2
    assert all(one.gain > 0 for one, _ in found)


def test_auto_is_another_optimizer_on_another_device(tiny_llama: Path, tmp_path: Path) -> None:
    many = {"r": 64}
    vocabulary = load_vocabulary(recipe_for(tmp_path, tiny_llama).model)

    def state(hardware: Hardware, **train: Any) -> int:
        recipe = recipe_for(tmp_path, tiny_llama, lora=many, train=train)
        planner = Planner(vocabulary, hardware, 8 * _GIB)
        return planner.plan(recipe).moment("training").components[OPTIMIZER]

    cpu, gpu = probe_hardware(), known_gpu("T4")
    assert state(cpu) == state(cpu, optim="adamw_torch_fused")
    assert state(gpu) == state(gpu, optim="paged_adamw_8bit") < state(cpu)


class TestGpus:
    @pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090"])
    def test_are_known_by_any_spelling(self, name: str) -> None:
        found = known_gpu(name, 8)
        assert (found.device_name, found.num_devices) == ("RTX 4090", 8)
        assert found.device_memory_bytes == 24 * _GIB

    def test_are_told_apart_by_size(self) -> None:
        assert known_gpu("A100 80GB").device_memory_bytes == 80 * _GIB
        assert known_gpu("A100").device_memory_bytes == 40 * _GIB

    def test_an_unknown_one_lists_the_others(self) -> None:
        with pytest.raises(HardwareError, match=r"no GPU 'RTX 9999'.*T4, .*H200"):
            known_gpu("RTX 9999")

    def test_every_entry_is_found_by_its_own_name(self) -> None:
        assert [known_gpu(name).device_name for name in GPUS] == list(GPUS)


@pytest.mark.parametrize(
    ("optim", "sizes", "wanted"),
    [
        ("adamw_torch", [100, 10], 8 * 110),
        ("sgd", [100], 0),
        ("paged_adamw_8bit", [8192], 2 * (8192 + 4 * 32)),
        ("adamw_8bit", [100], 2 * 4 * 100),
    ],
)
def test_state_of_an_optimizer(optim: str, sizes: list[int], wanted: int) -> None:
    assert state_bytes(optim, sizes) == wanted


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch"])
def test_state_is_what_the_optimizer_keeps(optim: str) -> None:
    from bitsandbytes.optim import AdamW8bit

    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (100, 5000)]
    kind: Any = AdamW8bit if optim == "adamw_8bit" else torch.optim.AdamW
    optimizer = kind(parameters, lr=1e-3)
    for one in parameters:
        one.grad = torch.ones_like(one)
    optimizer.step()
    kept = {
        value.data_ptr(): value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.startswith("qmap") and value.ndim
    }
    assert state_bytes(optim, [100, 5000]) == sum(kept.values())


def test_of_what_dora_lets_go_for_a_layer_a_part_leaves_holes() -> None:
    """It counts while it is there."""
    layer = dora.DoraLinearLayer(fan_in_fan_out=False)
    base = torch.nn.Linear(64, 48, bias=False)
    down, up = torch.nn.Linear(64, 2, bias=False), torch.nn.Linear(2, 48, bias=False)
    layer.update_layer(base_layer=base, lora_A=down.weight, lora_B=up.weight, scaling=2.0)
    own, x = dora.DoraLinearLayer.forward, torch.randn(1, 64)
    gone: list[int] = []
    for counts in (True, False):
        live = LiveTensors()
        with dora_with_fewer_holes(live if counts else None), live:
            result = layer(x, lora_A=down, lora_B=up, scaling=2.0, base_layer=base)
        assert sum(live.peak.values()) > 2 * base.weight.nbytes
        gone.append(live.gone_bytes)
        del result
    assert gone[1] > 2 * base.weight.nbytes
    assert gone[0] == pytest.approx(gone[1] / 2, abs=1)
    assert dora.DoraLinearLayer.forward is own
