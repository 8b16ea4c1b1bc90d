"""What was rendered once is taken from the cache, and only while all of it still holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import qlora_kit
from qlora_kit.data.cache import cache_folder, stamp_used
from qlora_kit.data.prepare import Part, prepare_eval, prepare_train
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSpec

from .formats import CHATML, build

PACKAGE = Path(qlora_kit.__file__).parent
MONTH_SECONDS = 31 * 24 * 3600


class Silent(PreTrainedTokenizerFast):
    """Cannot tokenize: whoever uses it has not taken what is in the cache."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("it was tokenized again")

    def apply_chat_template(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("it was rendered again")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build().save_pretrained(folder)
    return folder


@pytest.fixture
def loud(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture
def silent(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return Silent.from_pretrained(tokenizer_folder)


def rows(count: int = 4, word: str = "hello") -> list[dict[str, Any]]:
    turns = [
        [{"role": "user", "content": f"{word} {n}"}, {"role": "assistant", "content": "fine"}]
        for n in range(count)
    ]
    return [{"messages": one} for one in turns]


def spec_of(folder: Path, **values: Any) -> DataSpec:
    for name, word in (("train", "hello"), ("held", "thanks")):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(row) + "\n" for row in rows(word=word)))
    return DataSpec(
        train=({"path": str(folder / "train.jsonl")},),  # type: ignore[arg-type]
        eval=({"path": str(folder / "held.jsonl")},),  # type: ignore[arg-type]
        **values,
    )


def train(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Part:
    return prepare_train(spec, tokenizer, frozenset({tokenizer.eos_token_id}))


def held(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Part:
    return prepare_eval(spec, tokenizer, frozenset({tokenizer.eos_token_id}))


@pytest.mark.parametrize("part", [train, held])
def test_a_second_start_does_not_tokenize(
    tmp_path: Path,
    loud: PreTrainedTokenizerBase,
    silent: PreTrainedTokenizerBase,
    part: Callable[..., Part],
) -> None:
    spec = spec_of(tmp_path)
    with pytest.raises(AssertionError, match="again"):
        part(spec, silent)
    first = part(spec, loud)
    again = part(spec, silent)
    assert list(again.sequences) == list(first.sequences)
    assert again.ledger == first.ledger
    assert again.examples == first.examples


def test_packing_needs_no_other_entry(
    tmp_path: Path, loud: PreTrainedTokenizerBase, silent: PreTrainedTokenizerBase
) -> None:
    train(spec_of(tmp_path), loud)
    train(spec_of(tmp_path, packing=True), silent)


def test_another_place_of_the_same_bytes_under_the_same_name_is_told(
    tmp_path: Path, loud: PreTrainedTokenizerBase
) -> None:
    """Rows are shown with the file that they come from."""
    train(spec_of(tmp_path), loud)
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "moved" / "train.jsonl")
    part = train(spec_of(tmp_path / "moved"), loud)
    assert all(str(tmp_path / "moved") in one.origin for one in part.sequences)


def other_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content }} ")


def other_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens(["fine"])


def other_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.bos_token = "<|endoftext|>"


@pytest.mark.parametrize("change", [other_template, other_token, other_eos])
def test_another_tokenizer_or_template_is_a_miss(
    tmp_path: Path,
    loud: PreTrainedTokenizerBase,
    silent: PreTrainedTokenizerBase,
    change: Callable[[PreTrainedTokenizerBase], None],
) -> None:
    spec = spec_of(tmp_path)
    train(spec, loud)
    change(silent)
    with pytest.raises(AssertionError, match="again"):
        train(spec, silent)


def test_one_byte_of_the_source_is_a_miss(
    tmp_path: Path, loud: PreTrainedTokenizerBase, silent: PreTrainedTokenizerBase
) -> None:
    """Whatever its time says, and although it is as long as before."""
    spec = spec_of(tmp_path)
    train(spec, loud)
    path = tmp_path / "train.jsonl"
    before = path.stat()
    text = path.read_text()
    path.write_text(text.replace("hello 3", "hello 7"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(AssertionError, match="again"):
        train(spec, silent)
    assert "hello 7" in loud.decode(train(spec, loud).sequences[3].input_ids)
    path.write_text(text)
    train(spec, silent)


def test_an_eval_row_that_training_must_not_repeat_is_a_miss(
    tmp_path: Path, loud: PreTrainedTokenizerBase, silent: PreTrainedTokenizerBase
) -> None:
    spec = spec_of(tmp_path)
    assert len(train(spec, loud).sequences) == 4
    with (tmp_path / "held.jsonl").open("a") as file:
        file.write(json.dumps(rows()[0]) + "\n")
    with pytest.raises(AssertionError, match="again"):
        train(spec, silent)
    assert len(train(spec, loud).sequences) == 3


@pytest.mark.parametrize(
    "values",
    [
        {"max_length": 512},
        {"loss_on": "all"},
        {"loss_on": ("user", "assistant")},
        {"overlength": "split"},
        {"duplicates": "keep"},
        {"leaks": "keep"},
        {"seed": 1},
    ],
)
def test_another_section_is_a_miss(
    tmp_path: Path,
    loud: PreTrainedTokenizerBase,
    silent: PreTrainedTokenizerBase,
    values: dict[str, Any],
) -> None:
    train(spec_of(tmp_path), loud)
    with pytest.raises(AssertionError, match="again"):
        train(spec_of(tmp_path, **values), silent)


def test_train_and_eval_are_told_apart(
    tmp_path: Path, loud: PreTrainedTokenizerBase, silent: PreTrainedTokenizerBase
) -> None:
    spec = spec_of(tmp_path)
    spec = spec.model_copy(update={"eval": (), "held_out": 2})
    train(spec, loud)
    with pytest.raises(AssertionError, match="again"):
        held(spec, silent)


def test_a_model_that_stops_elsewhere_is_not_taken_for_proved(
    tmp_path: Path, loud: PreTrainedTokenizerBase
) -> None:
    """What was proved when the data were rendered holds for the tokens of that model."""
    spec = spec_of(tmp_path)
    train(spec, loud)
    with pytest.raises(DataError, match="the tuned model would not stop"):
        prepare_train(spec, loud, frozenset({0}))


def test_what_a_tokenizer_was_last_used_for_does_not_matter(
    tmp_path: Path, loud: PreTrainedTokenizerBase, silent: PreTrainedTokenizerBase
) -> None:
    train(spec_of(tmp_path), loud)
    silent.backend_tokenizer.enable_truncation(7)
    silent.backend_tokenizer.enable_padding()
    train(spec_of(tmp_path), silent)


_ONE_RUN = """
import sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from qlora_kit.data.prepare import prepare_train
from qlora_kit.recipe import DataSpec

tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
spec = DataSpec(train=({"path": sys.argv[2]},))
print("ready", flush=True)
sys.stdin.readline()
part = prepare_train(spec, tokenizer, frozenset({tokenizer.eos_token_id}))
print(len(part.sequences), sum(one.num_tokens for one in part.sequences))
"""


def start(*arguments: Path | str, package: Path = PACKAGE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _ONE_RUN, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate("go\n", timeout=300)
    assert process.returncode == 0, err
    return out.splitlines()[-1]


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir()) if cache.is_dir() else []


def test_two_processes_at_once_end_with_the_same_entry(
    tmp_path: Path, tokenizer_folder: Path, cache: Path
) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(3000)))
    both = [start(tokenizer_folder, path) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [finish(process) for process in both]
    assert said[0] == said[1]
    assert said[0].startswith("3000 ")
    [entry] = entries(cache)
    names = {one.name for one in entry.iterdir()}
    assert {"ledger.json", "tokens.bin", "supervised.bin", "index.npy", "texts.json"} < names


def test_a_killed_writer_leaves_no_entry(
    tmp_path: Path, tokenizer_folder: Path, loud: PreTrainedTokenizerBase, cache: Path
) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(20000)))
    process = start(tokenizer_folder, path)
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    process.stdin.write("go\n")
    process.stdin.flush()
    deadline = time.monotonic() + 120
    while not entries(cache) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    left = entries(cache)
    assert left, "it was killed while it wrote"
    assert all(one.name.startswith(".") for one in left), "nothing that could be taken for whole"
    path.write_text(path.read_text()[:2000].rpartition("\n")[0] + "\n")
    assert train(DataSpec(train=({"path": str(path)},)), loud).sequences  # type: ignore[arg-type]


def test_other_code_is_a_miss(tmp_path: Path, tokenizer_folder: Path, cache: Path) -> None:
    """A version that renders otherwise must not meet what an older one has rendered."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    copied = tmp_path / "code" / "qlora_kit"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    finish(start(tokenizer_folder, path, package=copied))
    finish(start(tokenizer_folder, path, package=copied))
    assert len(entries(cache)) == 1
    with (copied / "data" / "schemas" / "turns.py").open("a") as file:
        file.write("# otherwise\n")
    finish(start(tokenizer_folder, path, package=copied))
    assert len(entries(cache)) == 2


def test_what_fails_is_not_kept(tmp_path: Path, cache: Path) -> None:
    for spec, template in (
        (spec_of(tmp_path), CHATML.replace("<|im_end|>", "")),
        (spec_of(tmp_path, held_out=4).model_copy(update={"eval": ()}), CHATML),
    ):
        with pytest.raises(DataError):
            train(spec, build(template=template))
    assert entries(cache) == []


def test_losses_are_refused_from_the_cache_as_well(
    tmp_path: Path, loud: PreTrainedTokenizerBase
) -> None:
    spec = spec_of(tmp_path, max_length=8)
    for _ in range(2):
        with pytest.raises(DataError, match="nothing to train on"):
            train(spec, loud)


def test_entries_that_nobody_used_for_a_month_go(
    tmp_path: Path, loud: PreTrainedTokenizerBase, silent: PreTrainedTokenizerBase, cache: Path
) -> None:
    spec = spec_of(tmp_path)
    train(spec, loud)
    [old] = entries(cache)
    aged = time.time() - MONTH_SECONDS
    os.utime(old / "used", (aged, aged))
    train(spec, silent)
    assert (old / "used").stat().st_mtime > time.time() - 3600, "it is of use again"
    os.utime(old / "used", (aged, aged))
    train(spec_of(tmp_path, max_length=64), loud)
    [new] = entries(cache)
    assert new != old
    os.utime(new / "tokens.bin", (aged, aged))
    stamp_used(new)
    assert entries(cache) == [new], "what counts is when it was used, not when it was made"


def test_names_do_not_depend_on_the_process(
    tmp_path: Path, loud: PreTrainedTokenizerBase, silent: PreTrainedTokenizerBase
) -> None:
    spec = spec_of(tmp_path)
    names = {
        cache_folder("train", spec, ["a"], tokenizer, frozenset({2}))
        for tokenizer in (loud, silent)
    }
    assert len(names) == 1
    assert cache_folder("train", spec, ["b"], loud, frozenset({2})) not in names
