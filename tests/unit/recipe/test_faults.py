"""Every kind of fault: its path, what it says, what it tells the user to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_kit.errors import Fault, RecipeError
from qlora_kit.recipe import load_recipe, recipe_from_dict, shape
from qlora_kit.recipe.faults import OTHER_NAMES

MODEL = "model: {name_or_path: some/model}\n"
AWARE = "quantization: {{load_in_4bit: false}}\nquantization_aware: {{method: {}}}\n"
FULL = AWARE.format("int8, train: full")
DATA = "data: {train: [{path: a.jsonl}], eval: [{path: b.jsonl}]}\n"


def faults_of(text: str | bytes, folder: Path) -> list[Fault]:
    path = folder / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    return caught.value.faults


# Text below a sound model and data section, the path of its one fault, and words that it says.
IN_SECTIONS = [
    ("lora: {r: 0}", "lora.r", ["greater than 0", "got 0", "the default is 16"]),
    ("lora: {r: -1}", "lora.r", ["got -1"]),
    ("lora: {r: 2.0}", "lora.r", ["a whole number", "got 2.0", "write 2"]),
    ("lora: {r: 2.5}", "lora.r", ["a whole number", "got 2.5", "the default is 16"]),
    ("lora: {r: '16'}", "lora.r", ["got '16'", "without quotes"]),
    ("lora: {r: true}", "lora.r", ["a whole number", "got true"]),
    ("lora: {r: }", "lora.r", ["got nothing", "remove the key"]),
    ("lora: {r: [1]}", "lora.r", ["a whole number", "got [1]"]),
    (f"lora: {{r: {'9' * 30}}}", "lora.r", ["30 digits"]),
    ("lora: {dropout: 1}", "lora.dropout", ["less than 1", "got 1"]),
    ("lora: {alpha: .nan}", "lora.alpha", ["finite"]),
    ("lora: {alpha: .inf}", "lora.alpha", ["finite"]),
    ("lora: {use_dora: 'yes'}", "lora.use_dora", ["true or false", "without quotes"]),
    ("lora: {use_dora: 1}", "lora.use_dora", ["true or false", "got 1"]),
    ("lora: {alhpa: 2}", "lora.alhpa", ["unknown key", "did you mean 'alpha'"]),
    ("lora: {quux: 2}", "lora.quux", ["unknown key", "known here: r, alpha"]),
    ("lora: {lora_alpha: 2}", "lora.lora_alpha", ["here it is lora.alpha"]),
    ("train: {batch_size: 2}", "train.batch_size", ["train.per_device_train_batch_size"]),
    ("evaluate: {batch_size: 2}", "evaluate.batch_size", ["at evaluate.generate.batch_size"]),
    ("batch_size: 2", "batch_size", ["train.per_device_train_batch_size"]),
    ("lora: {loraplus_lr_ratio: 2}", "lora.loraplus_lr_ratio", ["at train.loraplus_lr_ratio"]),
    ("lora: {target_modules: 5}", "lora.target_modules", ["text or a list of text", "got 5"]),
    ("lora: {target_modules: {a: 1}}", "lora.target_modules", ["text or a list of text"]),
    ("lora: {target_modules: [q, 1]}", "lora.target_modules.1", ["must be text", "in quotes"]),
    ("lora: {target_modules: ''}", "lora.target_modules", ["not be empty"]),
    ("lora: {target_modules: []}", "lora.target_modules", ["at least one", "all-linear"]),
    ("lora: {target_modules: q_proj}", "lora.target_modules", ["write a list: [q_proj]"]),
    ("lora: {target_modules: '.*('}", "lora.target_modules", ["not a regular expression"]),
    ("lora: {rank_pattern: {q: 0}}", "lora.rank_pattern.q", ["greater than 0"]),
    ("lora: {rank_pattern: {q: x}}", "lora.rank_pattern.q", ["a whole number"]),
    ("lora: {rank_pattern: {'(': 1}}", "lora.rank_pattern.(", ["not a regular expression"]),
    ("lora: {rank_pattern: [1]}", "lora.rank_pattern", ["a mapping", "a list"]),
    ("lora: {new_tokens: [a, a]}", "lora.new_tokens", ["named twice: a"]),
    ("lora: {new_tokens: [' ']}", "lora.new_tokens", ["white space"]),
    ("lora: {new_tokens: [a], modules_to_save: [wte]}", "lora.new_tokens", ["all of wte"]),
    ("lora: {use_dora: true, init: loftq}", "lora.init", ["does not go with use_dora"]),
    ("lora: 5", "lora", ["must be a mapping of keys", "a number (5)"]),
    ("lora: [1]", "lora", ["must be a mapping of keys", "a list ([1])"]),
    ("lora: text", "lora", ["must be a mapping of keys", "text ('text')"]),
    ("lorra: {}", "lorra", ["unknown key", "did you mean 'lora'"]),
    ("learning_rate: 1", "learning_rate", ["belongs at train.learning_rate"]),
    ("output_dir: x", "output_dir", ["here it is run_dir"]),
    ("run_dir: ''", "run_dir", ["must not be empty"]),
    ("run_dir: 5", "run_dir", ["must be text", "in quotes"]),
    ("run_dir:", "run_dir", ["got nothing"]),
    ("quantization: {quant_type: nf5}", "quantization.quant_type", ["nf4, fp4", "mean 'nf4'"]),
    ("quantization: {load_in_8bit: true, load_in_4bit: true}", "quantization.load_in_8bit", ["on"]),
    (
        "quantization: {load_in_8bit: true, quant_type: fp4}",
        "quantization.quant_type",
        ["has no effect on an 8-bit base", "remove it"],
    ),
    (
        "quantization: {load_in_4bit: false, quant_storage: bfloat16}",
        "quantization.quant_storage",
        ["has no effect on a base that is not quantized"],
    ),
    (
        "quantization: {load_in_4bit: false, double_quant: false}",
        "quantization.double_quant",
        ["has no effect on a base that is not quantized"],
    ),
    (
        "quantization: {int8_threshold: 5}",
        "quantization.int8_threshold",
        ["has no effect on a base not in 8 bits", "load_in_8bit"],
    ),
    (
        "train: {save_strategy: 'no', save_total_limit: 5}",
        "train.save_total_limit",
        ["has no effect with save_strategy: no"],
    ),
    (
        "train: {optim: adafactor, adam_beta1: 0.8}",
        "train.adam_beta1",
        ["has no effect with optim: adafactor"],
    ),
    (
        "train: {optim: paged_lion_8bit, adam_epsilon: 1.0e-6}",
        "train.adam_epsilon",
        ["has no effect with optim: paged_lion_8bit"],
    ),
    (
        "quantization: {load_in_4bit: false, skip_modules: [a]}",
        "quantization.skip_modules",
        ["has no effect on a base that is not quantized"],
    ),
    ("quantization: {load_in_4bit: false}\nlora: {init: loftq}", "lora.init", ["not quantized"]),
    ("train: {learning_rate: '2e-4'}", "train.learning_rate", ["without quotes"]),
    ("train: {learning_rate: 1e999}", "train.learning_rate", ["finite"]),
    ("train: {max_steps: 1e3}", "train.max_steps", ["write 1000"]),
    ("train: {seed: -1}", "train.seed", ["at least 0"]),
    ("train: {optim: adamw8bit}", "train.optim", ["19 known values", "did you mean 'adamw_8bit'"]),
    ("train: {optim: adamw}", "train.optim", ["did you mean 'adamw_torch'"]),
    ("train: {optim: quux}", "train.optim", ["adamw_torch, ", "got 'quux'"]),
    ("train: {eval_strategy: yes}", "train.eval_strategy", ["must be one of no, steps, epoch"]),
    ("train: {report_to: wandb}", "train.report_to", ["must be a list", "write [wandb]"]),
    ("train: {report_to: [wandbb]}", "train.report_to.0", ["did you mean 'wandb'"]),
    ("train: {eval_strategy: steps}", "train.eval_steps", ["eval_strategy: steps needs it"]),
    ("train: {eval_steps: 5}", "train.eval_steps", ["no effect"]),
    ("train: {save_steps: 5}", "train.save_steps", ["no effect with save_strategy: epoch"]),
    ("train: {max_steps: 5, warmup_steps: 5}", "train.warmup_steps", ["not below max_steps"]),
    ("train: {warmup_steps: 2.5}", "train.warmup_steps", ["must be whole above 1"]),
    (
        "train: {precision: bf16}\nquantization: {compute_dtype: float16}",
        "train.precision",
        ["contradicts quantization.compute_dtype"],
    ),
    (
        "train: {lr_scheduler_type: reduce_lr_on_plateau}",
        "train.lr_scheduler_type",
        ["needs evaluation"],
    ),
    (
        "train: {lr_scheduler_kwargs: {num_cycles: [1]}}",
        "train.lr_scheduler_kwargs.num_cycles",
        ["a number, text or true or false", "got [1]"],
    ),
    (
        "train: {lr_scheduler_kwargs: {num_cycles: .nan}}",
        "train.lr_scheduler_kwargs.num_cycles",
        ["finite"],
    ),
    ("evaluate: {generate: text}", "evaluate.generate", ["a mapping of keys", "text ('text')"]),
    ("evaluate: {generate: true}", "evaluate.generate", ["got true", "write {}"]),
    ("evaluate: {generate: {metrics: []}}", "evaluate.generate.metrics", ["at least one"]),
    ("evaluate: {max_new_tokens: 5}", "evaluate.max_new_tokens", ["generate.max_new_tokens"]),
    (
        "evaluate: {stride_tokens: 2000, window_tokens: 8}",
        "evaluate.stride_tokens",
        ["2000 is longer than window_tokens (8)"],
    ),
    ("evaluate: {stride_tokens: 2000}", "evaluate.stride_tokens", ["data.max_length (1024)"]),
    (
        "evaluate: {perplexity: false, stride_tokens: 8}",
        "evaluate.stride_tokens",
        ["no effect"],
    ),
    (
        "export: {merge_options: {base: dequantized}}\nquantization: {load_in_4bit: false}",
        "export.merge_options.base",
        ["not quantized", "use original or auto"],
    ),
    ("export: {merge_options: {max_kl: 0}}", "export.merge_options.max_kl", ["greater than 0"]),
    ("export: {merge_options: {max_kl: -1}}", "export.merge_options.max_kl", ["greater than 0"]),
    ("export: {merge_options: {max_kl: .nan}}", "export.merge_options.max_kl", ["finite"]),
    ("export: {merge_options: {max_kl: .inf}}", "export.merge_options.max_kl", ["finite"]),
    ("quantization_aware: {}", "quantization_aware.method", ["is required"]),
    (
        "quantization: {overrides: {self_attn.v_proj:8}}",
        "quantization.overrides.self_attn.v_proj:8",
        ["a key without a value", "write 'self_attn.v_proj: 8', with a blank after the colon"],
    ),
    ("lora: {r:8}", "lora.r:8", ["a key without a value", "write 'r: 8', with a blank"]),
    (AWARE.format("int4"), "quantization_aware.method", ["one of", "int4-group", "got 'int4'"]),
    ("quantization_aware: {method: nf4}", "quantization_aware", ["4 bits", "load_in_4bit: false"]),
    (
        "quantization: {load_in_4bit: false, overrides: {q_proj: 4}}\n"
        "quantization_aware: {method: nf4}",
        "quantization_aware",
        ["4 bits", "remove quantization.overrides"],
    ),
    (AWARE.format("int8, block_size: 32"), "quantization_aware.block_size", ["no effect", "int8"]),
    (AWARE.format("nf4, group_size: 32"), "quantization_aware.group_size", ["no effect", "nf4"]),
    (AWARE.format("nf4, start_after: 2.5"), "quantization_aware.start_after", ["whole", "2.5"]),
    (AWARE.format("nf4, start_after: -1"), "quantization_aware.start_after", ["at least 0"]),
    (
        AWARE.format("nf4, start_after: 50") + "train: {max_steps: 50}",
        "quantization_aware.start_after",
        ["not below train.max_steps", "lower it"],
    ),
    (AWARE.format("nf4, skip_modules: ['']"), "quantization_aware.skip_modules", ["empty text"]),
    (AWARE.format("nf4") + "lora: {dropout: 0.1}", "lora.dropout", ["set it to 0"]),
    (AWARE.format("nf4") + "lora: {use_dora: true}", "lora.use_dora", ["remove one of the two"]),
    (AWARE.format("nf4, train: all"), "quantization_aware.train", ["one of adapter, full"]),
    (FULL + "lora: {r: 8, dropout: 0.1}", "lora", ["no effect", "remove the section"]),
    (FULL + "lora: {init: loftq}", "lora", ["no effect", "remove the section"]),
    (FULL + "train: {loraplus_lr_ratio: 16}", "train.loraplus_lr_ratio", ["no effect"]),
    (FULL + "export: {to: ['lora-gguf:Q8_0']}", "export.to.0", ["low-rank", "export the merged"]),
    (FULL + "export: {to: ['adapter:vllm']}", "export.to.0", ["low-rank", "export the merged"]),
    (
        "quantization_aware: {method: nf4, train: full}",
        "quantization_aware",
        ["4 bits", "no weight has a gradient", "load_in_4bit: false"],
    ),
]

IN_DATA = [
    ("", "data", ["is required", "train: [{path: my_rows.jsonl}]"]),
    ("data:", "data", ["is required"]),
    ("data: rows.jsonl", "data", ["a mapping of keys", "try data: {train"]),
    ("data: {train: }", "data.train", ["must be a list", "got nothing", "my_rows.jsonl"]),
    (
        "data: {train: [{path: demo/commands}], split_special_tokens: false}",
        "data.split_special_tokens",
        ["has no effect on messages", "remove it"],
    ),
    (
        "data: {train: [{path: a.csv, type: alpaca}], split_special_tokens: false}",
        "data.split_special_tokens",
        ["has no effect on alpaca", "remove it"],
    ),
    ("data: {train: []}", "data.train", ["at least one"]),
    ("data: {train: rows.jsonl}", "data.train", ["a list", "write [{path: rows.jsonl}]"]),
    ("data: {train: {path: rows.jsonl}}", "data.train", ["a list", "write [{…}]"]),
    ("data: {train: [rows.jsonl]}", "data.train.0", ["write {path: rows.jsonl}"]),
    ("data: {train: [{}]}", "data.train.0.path", ["is required"]),
    ("data: {train: [null]}", "data.train.0", ["got nothing", "remove the entry"]),
    ("data: {train: [{path: a, spilt: b}]}", "data.train.0.spilt", ["did you mean 'split'"]),
    ("data: {train: [{path: a, max_rows: 0}]}", "data.train.0.max_rows", ["greater than 0"]),
    ("data: {train: [{path: a.jsonl, split: test}]}", "data.train.0.split", ["a file is not"]),
    (
        "data: {train: [{path: a.jsonl}], eval: [{path: ./a.jsonl}]}",
        "data.train.0",
        ["also an eval source"],
    ),
    ("data: {train: [{path: a}], max_length: 2}", "data.max_length", ["at least 8", "1024"]),
    ("data: {train: [{path: a}], path: b}", "data.path", ["data.train.0.path"]),
    ("data: {train: [{path: a}]}\nexport: {merge: true}", "export.merge", ["held-out rows"]),
    ("data: {train: [{path: a}]}\nevaluate: {generate: {}}", "evaluate.generate", ["no source"]),
    (
        "data: {train: [{path: a}]}\ntrain: {eval_strategy: epoch}",
        "train.eval_strategy",
        ["no source"],
    ),
]

IN_MODEL = [
    ("", "model", ["is required", "demo/smollm2-135m-instruct"]),
    ("model:", "model", ["is required"]),
    ("model: some/model", "model", ["a mapping of keys", "try model: {name_or_path"]),
    ("model: {}", "model.name_or_path", ["is required"]),
    ("model: {name_or_path: }", "model.name_or_path", ["must be text", "got nothing"]),
    ("model: {name_or_path: ''}", "model.name_or_path", ["must not be empty"]),
    ("model: {name_or_path: 5}", "model.name_or_path", ["must be text", "in quotes"]),
    ("model: {name_or_path: a, revision: 1234567}", "model.revision", ["in quotes"]),
    ("model: {name_or_path: demo/a, revision: b}", "model.revision", ["only a hub id"]),
    ("model: {name_or_path: ./a, revision: b}", "model.revision", ["only a hub id"]),
    ("model: {name_or_path: demo/a, gguf_file: b}", "model.gguf_file", ["one file"]),
    ("model: {name_or_path: a.gguf, gguf_file: b}", "model.gguf_file", ["already names"]),
]

WHOLE_FILES: list[tuple[str | bytes, list[str]]] = [
    ("", ["is empty"]),
    ("# only a comment", ["is empty"]),
    ("- 1", ["must be a mapping of sections", "a list"]),
    ("text", ["must be a mapping of sections", "text ('text')"]),
    ((MODEL + DATA).encode("utf-16"), ["not UTF-8"]),
    ((MODEL + DATA).encode() + b"# \xff", ["not UTF-8", "at byte"]),
    (b"x" * 300_000, ["is no recipe", "300,000 bytes"]),
]


def the_fault(text: str | bytes, folder: Path, words: list[str]) -> Fault:
    (fault,) = faults_of(text, folder)
    for word in words:
        assert word in str(fault), str(fault)
    assert "Input should" not in str(fault), "pydantic's own words"
    assert len(str(fault)) < 400
    return fault


@pytest.mark.parametrize(("text", "path", "words"), IN_SECTIONS)
def test_a_fault_in_a_section(text: str, path: str, words: list[str], tmp_path: Path) -> None:
    assert the_fault(MODEL + DATA + text, tmp_path, words).path == path


@pytest.mark.parametrize(("text", "path", "words"), IN_DATA)
def test_a_fault_in_data(text: str, path: str, words: list[str], tmp_path: Path) -> None:
    assert the_fault(MODEL + text, tmp_path, words).path == path


@pytest.mark.parametrize(("text", "path", "words"), IN_MODEL)
def test_a_fault_in_model(text: str, path: str, words: list[str], tmp_path: Path) -> None:
    assert the_fault(DATA + text, tmp_path, words).path == path


@pytest.mark.parametrize(("content", "words"), WHOLE_FILES)
def test_a_file_that_is_no_recipe(content: str | bytes, words: list[str], tmp_path: Path) -> None:
    assert the_fault(content, tmp_path, words).path == ""


def test_all_faults_at_once(tmp_path: Path) -> None:
    text = """
model: {name_or_path: a, revison: main}
data: {train: [{path: a.jsonl, split: test}]}
lora: {r: 0, target_modules: 5, alhpa: 1}
train: {eval_strategy: steps, eval_steps: 10}
evaluate: {generate: 3}
export: {merge: true}
quantization: {load_in_4bit: maybe}
extra: 1
"""
    paths = [fault.path for fault in faults_of(text, tmp_path)]
    assert sorted(paths) == [
        "data.train.0.split",  # within a sound section
        "evaluate.generate",
        "export.merge",  # between sections, though others are at fault
        "extra",
        "lora.alhpa",
        "lora.r",
        "lora.target_modules",
        "model.revison",
        "quantization.load_in_4bit",
        "train.eval_strategy",
    ]


def test_a_section_at_fault_invents_no_contradiction(tmp_path: Path) -> None:
    """Its stand-in must agree with whatever the other sections say."""
    text = MODEL + (
        "data: 5\ntrain: {eval_strategy: epoch}\nexport: {merge: true}\n"
        "evaluate: {generate: {}, stride_tokens: 9999}\n"
    )
    assert [fault.path for fault in faults_of(text, tmp_path)] == ["data"]


def test_what_other_tools_call_it_exists_here() -> None:
    for key, path in OTHER_NAMES.items():
        assert shape.at(path.split(".")) is not None, key


@pytest.mark.parametrize(
    "text",
    [
        "train: {optim: adamw_torch, adam_beta1: 0.8, adam_beta2: 0.95, adam_epsilon: 1.0e-6}",
        "train: {adam_beta1: 0.8, adam_beta2: 0.95, adam_epsilon: 1.0e-6}",
        "train: {optim: paged_ademamix_8bit, adam_beta1: 0.8, adam_epsilon: 1.0e-6}",
        "train: {optim: lion_8bit, adam_beta1: 0.8}",
        "train: {save_strategy: epoch, save_total_limit: 5}",
        "quantization: {load_in_8bit: true, int8_threshold: 5, skip_modules: [a]}",
        "quantization: {quant_type: fp4, double_quant: false, quant_storage: bfloat16}",
        AWARE.format("nf4, block_size: 32, double_quant: false, start_after: 0.1"),
        AWARE.format("int4-group, group_size: 32, start_after: 20, skip_modules: [q_proj]"),
        AWARE.format("int8"),
    ],
)
def test_an_option_that_is_read_is_no_fault(text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name_or_path: m}}\ndata: {{train: [{{path: a.jsonl}}]}}\n{text}\n")
    load_recipe(recipe)


@pytest.mark.parametrize(
    ("section", "field", "said"),
    [
        ("train", "gradient_checkpointing", "must be true or false or auto, got 'atuo'"),
        ("data", "padding_free", "must be auto or true or false, got 'atuo'"),
    ],
)
def test_a_word_beside_true_and_false_is_told_among_other_faults(
    section: str, field: str, said: str
) -> None:
    values: dict[str, Any] = {
        "model": {"name_or_path": "x"},
        "data": {"train": [{"path": "a.jsonl"}]},
        "train": {"learning_rate": -1},
    }
    values[section] = {**values[section], field: "atuo"}
    with pytest.raises(RecipeError) as raised:
        recipe_from_dict(values, "x.yaml")
    told = str(raised.value)
    assert f"{section}.{field}: {said}" in told
    assert "train.learning_rate" in told
