"""Tasks of lm-eval through a runtime, against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qlora_kit import extras
from qlora_kit.cli import app
from qlora_kit.errors import DataError, HardwareError, ModelError
from qlora_kit.runtime.open import open_runtime
from qlora_kit.runtime.protocol import Runtime

ROWS = [
    {"question": f"turn the lamp to {n} percent", "choices": ["yes", "no"], "answer": n % 2}
    for n in range(8)
]
YAML = """
task: tiny_lamps
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


GONE = "dataset_path: json\ndataset_kwargs: {data_files: {test: no-such-rows.jsonl}}"


@pytest.fixture
def runtime(tiny_llama: Path) -> Runtime:
    return open_runtime(str(tiny_llama))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    made = tmp_path / "tasks"
    made.mkdir()
    (made / "tiny.yaml").write_text(YAML.format(rows=rows))
    return made


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def logprob(folder: Path, ids: list[int], length: int) -> float:
    """Of the last `length` tokens, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        all_ids = torch.tensor([ids])
        logprobs = torch.log_softmax(model(input_ids=all_ids).logits[0, :-1], -1)
    own = logprobs.gather(1, all_ids[0, 1:, None])[:, 0]
    return float(own[len(own) - length :].sum())


def test_likelihoods_are_those_of_plain_transformers(runtime: Runtime, tiny_llama: Path) -> None:
    from qlora_kit.evaluate.tasks import RuntimeLM

    lm = RuntimeLM(runtime, 2)
    pairs = [("turn the kitchen lamp", " to 30 percent"), ("", "hello"), ("quick brown", " fox")]
    found = lm.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        before = lm.tok_encode(context) if context else [lm.prefix_token_id]
        ids = before + lm.tok_encode(continuation, add_special_tokens=False)
        assert value == pytest.approx(logprob(tiny_llama, ids, len(ids) - len(before)), rel=1e-2)
        assert not is_greedy
    whole = lm.tok_encode("turn the lamp", add_special_tokens=False)
    [rolling] = lm.loglikelihood_rolling([request("turn the lamp")])
    ids = [lm.prefix_token_id, *whole]
    assert rolling == pytest.approx(logprob(tiny_llama, ids, len(whole)), rel=1e-2)


def test_a_long_text_is_read_to_its_end(runtime: Runtime) -> None:
    from qlora_kit.evaluate.tasks import RuntimeLM

    lm = RuntimeLM(runtime, 4)
    text = "the quick brown fox jumps over the lazy dog " * 60
    assert len(lm.tok_encode(text)) > 2 * lm.max_length
    long, short = lm.loglikelihood_rolling([request(text), request(text[:44])])
    assert long < 20 * short < 0


def test_answers_end_where_the_task_says(runtime: Runtime) -> None:
    from qlora_kit.evaluate.tasks import RuntimeLM

    lm = RuntimeLM(runtime, 4)
    [whole] = lm.generate_until([request("turn the", {"max_gen_toks": 8, "until": []})])
    assert len(whole) > 2
    [cut] = lm.generate_until([request("turn the", {"max_gen_toks": 8, "until": [whole[2]]})])
    assert cut == whole.split(whole[2])[0]
    with pytest.raises(ModelError, match="do_sample"):
        lm.generate_until([request("turn", {"do_sample": True, "temperature": 0.7})])


def test_a_task_of_ones_own(tiny_llama: Path, folder: Path) -> None:
    words = ["evaluate", str(tiny_llama), "--tasks", "tiny_lamps", "--include-path", str(folder)]
    ended = CliRunner().invoke(app, [*words, "--json"])
    assert ended.exit_code == 0, (ended.output, ended.exception)
    found = json.loads(ended.stdout)["tasks"]["tiny_lamps"]

    def better(question: str) -> int:
        tokenizer = open_runtime(str(tiny_llama)).tokenizer
        values = []
        for choice in ("yes", "no"):
            context = tokenizer(question)["input_ids"]
            ids = tokenizer(f"{question} {choice}")["input_ids"]
            values.append(logprob(tiny_llama, ids, len(ids) - len(context)))
        return values.index(max(values))

    right = sum(better(row["question"]) == row["answer"] for row in ROWS)
    assert found["acc,none"] == right / len(ROWS)
    assert found["num_rows"] == len(ROWS)


def test_rows_that_are_not_to_be_had_are_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_kit.runtime.open.open_runtime", None)
    for name, rows in (("away", "dataset_path: nobody/no-such-set"), ("gone", GONE)):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\n{rows}\ntest_split: test\noutput_type: multiple_choice\n"
            "doc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        )
        words = ["evaluate", "demo/smollm2-135m-instruct", "--tasks", name]
        ended = CliRunner().invoke(app, [*words, "--include-path", str(tmp_path)])
        assert isinstance(ended.exception, DataError), ended.exception
        assert f"the rows of {name} are not to be had" in str(ended.exception)


def test_what_cannot_be_asked_is_told_before_the_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", "demo/smollm2-135m-instruct", "--tasks"]
    monkeypatch.setattr("qlora_kit.runtime.open.open_runtime", None)
    # The thousands that lm-eval brings take ten seconds to look through.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "none" / "manager.py"))
    ended = CliRunner().invoke(app, [*words, "no_such", "--include-path", str(folder)])
    assert isinstance(ended.exception, DataError)
    assert "lm-eval knows no task no_such" in str(ended.exception)
    monkeypatch.setitem(extras.EXTRAS, "lm-eval", ("no_such_module_here",))
    ended = CliRunner().invoke(app, [*words, "tiny_lamps"])
    assert isinstance(ended.exception, HardwareError)
    assert "pip install 'qlora-kit[lm-eval]'" in str(ended.exception)
    ended = CliRunner().invoke(app, ["evaluate", "demo/smollm2-135m-instruct", "--limit", "3"])
    assert ended.exit_code == 2
