"""Several models measured against the first: figures, refusals, the picture, the verb."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build_llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qlora_kit.cli import app
from qlora_kit.errors import HardwareError, ModelError
from qlora_kit.evaluate.compare import Comparison, Failure, compare_models
from qlora_kit.evaluate.one import Measurement, Task, measure_one
from qlora_kit.evaluate.speed import SpeedPlan, measure_speed
from qlora_kit.recipe import DataSpec, EvaluateSpec
from qlora_kit.report.comparison import comparison, short_names
from qlora_kit.report.plot import plot
from qlora_kit.report.reporter import Reporter
from qlora_kit.runtime.open import open_runtime

TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"turn lamp {n} to {n * 10} percent"},
            {"role": "assistant", "content": f'{{"lamp":{n}}}'},
        ]
    }
    for n in range(6)
]
QUICK = SpeedPlan(prompt_tokens=24, new_tokens=4, repetitions=2)


class Told(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)

    def table(self, title: str, columns: object, rows: object) -> None:
        self.lines += [title, *(" ".join(row) for row in rows)]  # type: ignore[attr-defined]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    rows = tmp_path / "held.jsonl"
    rows.write_text("\n".join(map(json.dumps, TALKS)))
    source = {"path": str(rows)}
    evaluate = EvaluateSpec(generate={"max_new_tokens": 4, "metrics": ["exact_match", "rouge"]})  # type: ignore[arg-type]
    data = DataSpec(train=(source,), eval=(source,), max_length=128)  # type: ignore[arg-type]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Task(evaluate, data, scratch, max_tokens=40, speed=QUICK)


def noisy(folder: Path, copy: Path, amount: float) -> Path:
    shutil.copytree(folder, copy)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * amount)
    model.save_pretrained(copy)
    return copy


@pytest.fixture
def pair(task: Task, tiny_llama: Path, tmp_path: Path) -> tuple[Measurement, Measurement]:
    other = noisy(tiny_llama, tmp_path / "other", 0.02)
    return (
        measure_one(str(tiny_llama), task, is_reference=True),
        measure_one(str(other), task, is_reference=False),
    )


def test_the_second_is_held_against_what_the_first_left(
    pair: tuple[Measurement, Measurement], task: Task, tiny_llama: Path, tmp_path: Path
) -> None:
    first, other = pair
    assert first.divergence is None
    assert other.divergence is not None
    assert other.divergence.num_tokens == 40
    assert other.divergence.kl_mean > 0
    itself = measure_one(str(tiny_llama), replace(task, speed=None), is_reference=False)
    assert itself.divergence is not None
    assert itself.divergence.kl_mean == pytest.approx(0, abs=1e-9)
    assert itself.divergence.top1_agreement == 1
    assert itself.cost.speed is None

    for model, name in ((tiny_llama, first), (tmp_path / "other", other)):
        plain = AutoModelForCausalLM.from_pretrained(model)
        assert name.cost.footprint.num_parameters == plain.num_parameters()
        assert name.cost.footprint.memory_bytes >= 4 * plain.num_parameters()
    assert first.cost.peak_bytes > first.cost.idle_bytes > 0
    assert first.cost.load_seconds > 0
    assert first.evaluation.metrics.keys() == {"rouge1", "rouge2", "rougeL"}


def test_perplexity_is_that_of_a_plain_loop(
    pair: tuple[Measurement, Measurement], task: Task, tiny_llama: Path
) -> None:
    """transformers' own loss, one row at a time."""
    from qlora_kit.data.prepare import prepare_eval

    runtime = open_runtime(str(tiny_llama))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    total, count = 0.0, 0
    for row in prepare_eval(task.data, runtime.tokenizer, runtime.stop_ids).sequences:
        with torch.no_grad():
            loss = model(
                input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])
            ).loss
        total, count = total + float(loss) * row.num_supervised, count + row.num_supervised
    perplexity = pair[0].evaluation.perplexity
    assert perplexity is not None
    assert perplexity.loss == pytest.approx(total / count, abs=2e-3)


def test_another_vocabulary_is_refused_and_the_rest_measured(task: Task, tmp_path: Path) -> None:
    measure_one(str(build_llama(tmp_path / "one")), task, is_reference=True)
    other = build_llama(tmp_path / "two")
    file = other / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    by_id = {number: token for token, number in vocabulary.items()}
    vocabulary[by_id[10]], vocabulary[by_id[11]] = 11, 10
    file.write_text(json.dumps(values))
    found = measure_one(str(other), task, is_reference=False)
    assert found.divergence is None
    assert "2 of 3" in found.refused
    assert "entries differ, the first of them 10" in found.refused
    assert found.evaluation.perplexity is not None
    assert found.cost.speed is not None


def test_table_and_picture(pair: tuple[Measurement, Measurement], tmp_path: Path) -> None:
    found = Comparison(pair, (Failure("gone.gguf", "is damaged"),))
    told = Told()
    comparison(told, found)
    text = "\n".join(told.lines)
    assert "gone.gguf could not be measured: is damaged" in text
    assert "turn lamp 0 to 0 percent" in text
    assert "100% float32" in text
    for suffix in (".png", ".svg"):
        plot(found, tmp_path / f"picture{suffix}")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "picture.svg").read_text()
    assert "svg" in drawn[:300]
    assert not list(tmp_path.glob(".picture*"))
    json.dumps(found.as_dict(), allow_nan=False)


def test_labels_do_not_cover_each_other() -> None:
    from matplotlib.figure import Figure

    from qlora_kit.report.labels import place_labels

    figure = Figure(figsize=(6, 5))
    axis = figure.subplots()
    points = [(1.0, 1.0, "one\nKL 0.1"), (1.02, 1.0, "two\nKL 0.2"), (1.0, 1.03, "three")]
    axis.scatter([1, 1.02, 1, 0, 2], [1, 1, 1.03, 0, 2])
    figure.draw_without_rendering()
    place_labels(axis, points)
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == 3
    for number, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[number + 1 :])


def test_no_label_stands_nearer_to_the_point_of_another() -> None:
    from matplotlib.figure import Figure

    from qlora_kit.report.labels import place_labels

    figure = Figure(figsize=(5.5, 4.8))
    axis = figure.subplots()
    names = ("qwen2", "qwen2-nf4\nKL 0.28", "qwen2-int8\nKL 0.0059", "qwen2-gptq\nKL 0.14")
    speeds, perplexities = (
        (143, 41, 45, 50, 72, 585),
        (1615.6, 1603.6, 1611.6, 1616.7, 1554.8, 1620),
    )
    points = [*zip(speeds, perplexities, (*names, "awq", "onnx"), strict=True)]
    axis.scatter(speeds, perplexities)
    axis.margins(x=0.22, y=0.18)
    figure.draw_without_rendering()
    place_labels(axis, points)
    for label, own in zip(axis.texts, points, strict=True):
        box = label.get_window_extent()
        away = {}
        for x, y, name in points:
            right, up = axis.transData.transform((x, y))
            across = max(box.x0 - right, 0, right - box.x1)
            away[name] = math.hypot(across, max(box.y0 - up, 0, up - box.y1))
        assert min(away, key=away.__getitem__) == own[2]


def test_speed_is_counted_by_the_clock(tiny_llama: Path) -> None:
    """A clock that moves 1 s for a prompt and half a second for each token after the first."""
    runtime = open_runtime(str(tiny_llama))
    now = [0.0]

    class Timed:
        name, tokenizer, context_tokens = "timed", runtime.tokenizer, 100
        prompts: tuple[tuple[int, ...], ...] = ()

        def generate(self, prompts: list[list[int]], limit: int, batch: int) -> list[list[int]]:
            self.prompts += (tuple(prompts[0]),)
            warm = 1 if len(self.prompts) > 2 else 10
            now[0] += warm * (1 + 0.5 * (limit - 1))
            return [[7] * limit]

    timed = Timed()
    speed = measure_speed(timed, SpeedPlan(20, 5, 3), clock=lambda: now[0])  # type: ignore[arg-type]
    assert (speed.prefill.median, speed.prefill.lowest, speed.prefill.highest) == (20, 20, 20)
    assert speed.decode is not None
    assert speed.decode.median == pytest.approx(2)
    assert speed.prefill.count == 3
    assert len(set(timed.prompts)) == len(timed.prompts) == 8
    with pytest.raises(ModelError, match="attends to 100 tokens"):
        measure_speed(timed, SpeedPlan(20, 100))  # type: ignore[arg-type]


def test_a_prompt_is_shorter_where_the_context_is(task: Task, tiny_llama: Path) -> None:
    """Tiny models attend to 256 tokens."""
    measured = measure_one(str(tiny_llama), replace(task, speed=SpeedPlan(1000, 6, 1)), True)
    assert measured.cost.speed is not None
    assert measured.cost.speed.prompt_tokens == 250
    assert "reading was timed with 250" in "".join(measured.notes)


def test_names_are_as_short_as_they_may_be() -> None:
    assert short_names(["a/b/nf4", "a/b/int8"]) == ["nf4", "int8"]
    assert short_names(["a/x/merged", "a/y/merged"]) == ["x/merged", "y/merged"]


def test_a_process_that_is_killed_is_a_message(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures.process import BrokenProcessPool

    class Killed:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> Killed:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, *_: object) -> Killed:
            return self

        def result(self) -> None:
            raise BrokenProcessPool

    monkeypatch.setattr("qlora_kit.evaluate.compare.ProcessPoolExecutor", Killed)
    with pytest.raises(HardwareError, match="was killed, most likely as memory ran out"):
        compare_models(["one", "two"], task)
    assert not list(task.scratch.iterdir())


def test_the_verb(tiny_llama: Path, tmp_path: Path) -> None:
    """In processes of their own; what is no model is told at the end, exit code 1."""
    text = tmp_path / "text.txt"
    text.write_text("turn the kitchen lamp to 30 percent, please. " * 20)
    broken = tmp_path / "broken"
    broken.mkdir()
    options = ["--text", str(text), "--window", "64", "--repetitions", "0", "--json"]
    names = [str(tiny_llama), str(broken)]
    picture = tmp_path / "a.png"
    ended = CliRunner().invoke(app, ["compare", *names, *options, "--plot", str(picture)])
    assert ended.exit_code == 1, ended.output
    found = json.loads(ended.stdout)
    assert [one["name"] for one in found["models"]] == names[:1]
    assert found["models"][0]["evaluation"]["perplexity"]["num_tokens"] > 100
    assert found["failures"][0]["name"] == str(broken)
    assert picture.is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one"], "two models or more"),
        (["./no-such-folder", "./neither"], "does not exist"),
        (["{model}", "{model}"], "--recipe RECIPE"),
        (["{model}", "{model}", "--plot", "picture.gif"], ".png, .svg, .pdf"),
        (["{model}", "{model}", "--text", "no-such.txt"], "no-such.txt does not exist"),
        (["{model}", "{model}", "--plot", "{model}/config.json/a.png"], "config.json is a file"),
    ],
)
def test_bad_input_is_told_at_once(arguments: list[str], said: str, tiny_llama: Path) -> None:
    words = [one.format(model=tiny_llama) for one in arguments]
    ended = CliRunner().invoke(app, ["compare", *words])
    assert ended.exit_code != 0
    told = ended.output + ended.stderr + str(ended.exception)
    assert said in " ".join(told.replace("│", " ").split())
