"""Calibration text: where it comes from, how it is drawn, and what the comparison gets instead."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import build_tokenizer
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import DataError, ModelError
from qlora_kit.quantize import texts as texts_module
from qlora_kit.quantize.calibration import (
    DEFAULT_TOKENS,
    CalibrationSpec,
    draw_calibration,
    require_wanted,
)
from qlora_kit.quantize.held_out import Named, texts_for
from qlora_kit.quantize.texts import KnownSet, Texts, find_texts, render_texts
from qlora_kit.recipe import SourceSpec

from .tiny_sources import text_file

TEXTS = Texts((), "all", "some rows")


def rows(*lengths: int, start: int = 0) -> list[TokenSequence]:
    """Sequences that all differ."""
    made = []
    for number, length in enumerate(lengths):
        ids = tuple(range(start + 1000 * number, start + 1000 * number + length))
        made.append(TokenSequence(ids, ids, f"rows:{number}"))
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def test_the_number_of_tokens_is_met_and_told() -> None:
    drawn = draw_calibration(TEXTS, [rows(*[20] * 30)], CalibrationSpec(num_tokens=130), None)
    assert drawn.num_tokens == sum(one.num_tokens for one in drawn.sequences) == 130
    assert "130 of 600 tokens of some rows in 7 sequences" in drawn.description
    assert "drawn random, seed 42" in drawn.description


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    source = [rows(*[20] * 30)]
    one, again, other = (
        draw_calibration(TEXTS, source, CalibrationSpec(num_tokens=100, seed=seed), None).sequences
        for seed in (1, 1, 2)
    )
    assert one == again != other


def test_whole_begins_at_the_first_row() -> None:
    source = rows(*[20] * 30)
    spec = CalibrationSpec(num_tokens=60, sampling="whole")
    assert draw_calibration(TEXTS, [source], spec, None).sequences == tuple(source[:3])


def test_by_source_gives_each_source_its_share() -> None:
    sources = [rows(*[10] * 90), rows(*[30] * 5, start=100_000), rows(*[20] * 40, start=200_000)]
    spec = CalibrationSpec(num_tokens=300, sampling="by-source")
    tokens: Counter[int] = Counter()
    for one in draw_calibration(TEXTS, sources, spec, None).sequences:
        tokens[one.input_ids[0] // 100_000] += one.num_tokens
    assert max(tokens.values()) - min(tokens.values()) <= 30
    few = CalibrationSpec(num_tokens=900, sampling="by-source")  # more than the second one has
    drawn = draw_calibration(TEXTS, sources, few, None)
    assert sum(one.num_tokens for one in drawn.sequences if 1e5 <= one.input_ids[0] < 2e5) == 150


def test_by_length_gives_short_and_long_rows_alike() -> None:
    source = [rows(*[10] * 300, *[40] * 300, *[80] * 300, *[160] * 300)]
    spec = CalibrationSpec(num_tokens=1600, sampling="by-length")
    tokens: Counter[int] = Counter()
    for one in draw_calibration(TEXTS, source, spec, None).sequences:
        tokens[len(one.input_ids)] += one.num_tokens
    assert all(abs(tokens[length] - 400) <= 160 for length in (10, 40, 80, 160))


def test_long_rows_are_cut_and_nothing_is_lost() -> None:
    (row,) = rows(50)
    spec = CalibrationSpec(max_length=20, sampling="whole")
    drawn = draw_calibration(TEXTS, [[row]], spec, None).sequences
    assert [one.num_tokens for one in drawn] == [20, 20, 10]
    assert tuple(token for one in drawn for token in one.input_ids) == row.input_ids


def test_unasked_there_is_an_upper_limit_and_no_lower_one() -> None:
    many = draw_calibration(TEXTS, [rows(*[500] * 60)], CalibrationSpec(), None)
    few = draw_calibration(TEXTS, [rows(20)], CalibrationSpec(), None)
    assert (many.num_tokens, few.num_tokens) == (DEFAULT_TOKENS, 20)


def test_text_that_is_shorter_than_asked_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"1,000 tokens were asked .* some rows has 60; name.* 60 with"
    ):
        draw_calibration(TEXTS, [rows(20, 40)], CalibrationSpec(num_tokens=1000), None)


def test_text_that_is_all_held_out_is_refused() -> None:
    with pytest.raises(DataError, match="some rows has nothing left to calibrate on"):
        draw_calibration(TEXTS, [[]], CalibrationSpec(), None)


def test_a_single_token_is_no_sequence() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        CalibrationSpec(num_tokens=1)


def test_a_length_that_was_asked_for_and_exceeds_the_context_is_refused() -> None:
    with pytest.raises(ModelError, match=r"256 tokens exceeds .* context of 128"):
        draw_calibration(TEXTS, [rows(20)], CalibrationSpec(max_length=256), 128)


@pytest.mark.parametrize(("context", "longest"), [(128, 128), (1024, 512), (None, 512)])
def test_an_unasked_length_is_what_the_model_attends_to(context: int | None, longest: int) -> None:
    drawn = draw_calibration(TEXTS, [rows(2000)], CalibrationSpec(), context)
    assert max(one.num_tokens for one in drawn.sequences) == longest
    assert f"sequences of at most {longest}, drawn" in drawn.description


def test_text_that_is_needed_or_useless_is_told() -> None:
    require_wanted("optional", "a", False)
    require_wanted("optional", "a", True)
    with pytest.raises(DataError, match="name some with --calibration"):
        require_wanted("required", "int8", False)
    with pytest.raises(DataError, match="has no effect"):
        require_wanted("none", "nf4", True)


def test_a_fifth_of_a_file_is_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = str(text_file(tmp_path / "rows.jsonl", 50))
    _, kept, held = texts_for(Named(path, None), tokenizer, seed=0)
    calibrating = {row.input_ids for source in kept for row in source}
    assert (len(calibrating), len(held.sequences)) == (40, 10)
    assert not calibrating & {row.input_ids for row in held.sequences}
    assert "a fifth of the rows of" in held.description


def test_rows_that_cannot_be_used_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_kit.data.render.MOST_CHARACTERS", 2_000)
    sound = text_file(tmp_path / "rows.jsonl", 20)
    faulty = tmp_path / "faulty.jsonl"
    no_json, no_text, empty = "{not json", json.dumps({"text": 7}), json.dumps({"text": ""})
    enormous = json.dumps({"text": "so " * 1_000})
    lines = [sound.read_text().strip(), no_json, no_text, empty, enormous]
    faulty.write_text("\n".join(lines) + "\n")
    texts, kept, held = texts_for(Named(str(faulty), "demo/commands"), tokenizer, seed=0)
    assert texts is not None
    assert texts.description == "faulty.jsonl, 4 of whose rows cannot be used"
    assert sum(map(len, kept)) == 20
    drawn = draw_calibration(texts, kept, CalibrationSpec(num_tokens=30), None)
    assert "4 of whose rows cannot be used" in drawn.description
    assert "cannot" not in held.description
    _, _, held = texts_for(Named(None, str(faulty)), tokenizer, seed=0)
    assert held.description == "faulty.jsonl, 4 of whose rows cannot be used"


def test_a_refusal_says_what_was_put_aside(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = str(text_file(tmp_path / "rows.jsonl", 500))
    more = CalibrationSpec(num_tokens=10**6)
    texts, kept, _ = texts_for(Named(path, None), tokenizer, seed=0)
    assert texts is not None
    with pytest.raises(
        DataError, match=r"besides the fifth of its rows .*--data.*sets free"
    ) as said:
        draw_calibration(texts, kept, more, None)
    available = sum(row.num_tokens for source in kept for row in source)
    assert str(said.value).count(f"{available:,}") == 2
    texts, kept, _ = texts_for(Named(path, "demo/commands"), tokenizer, seed=0)
    assert texts is not None
    with pytest.raises(DataError) as said:
        draw_calibration(texts, kept, more, None)
    assert "a fifth" not in str(said.value)
    assert "put aside" not in str(said.value)


def test_a_single_text_is_cut_in_two(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "book.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    _, ((kept,),), held = texts_for(Named(str(path), None), tokenizer, seed=0)
    (rest,) = held.sequences
    whole = render_texts(find_texts(str(path), "train"), tokenizer).rows[0][0]
    assert kept.input_ids + rest.input_ids == whole.input_ids
    short = tmp_path / "short.txt"
    short.write_text("hi")
    with pytest.raises(DataError, match="too few to calibrate and to compare on"):
        texts_for(Named(str(short), None), tokenizer, seed=0)


def test_rows_in_common_are_left_out_of_the_comparison(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    one, other = text_file(tmp_path / "a.jsonl", 20), text_file(tmp_path / "b.jsonl", 8, seed=1)
    both = tmp_path / "both.jsonl"
    both.write_text(other.read_text() + one.read_text())
    _, _, held = texts_for(Named(str(one), str(both)), tokenizer, seed=0)
    assert len(held.sequences) == 8
    assert "20 of whose rows are left out because they calibrate" in held.description
    with pytest.raises(DataError, match=r"every row of .* is among the calibration text"):
        texts_for(Named(str(one), str(one)), tokenizer, seed=0)


def test_without_any_text_the_demo_is_compared_on(tokenizer: PreTrainedTokenizerBase) -> None:
    texts, kept, held = texts_for(Named(None, None), tokenizer, seed=0)
    assert texts is None
    assert kept == []
    assert held.description == "demo/commands (test)"
    assert all(row.num_supervised for row in held.sequences)
    texts, kept, held = texts_for(Named("demo/commands", None), tokenizer, seed=0)
    assert texts is not None
    assert (texts.description, held.description) == (
        "demo/commands (train)",
        "demo/commands (test)",
    )


def test_a_base_model_without_template_reads_conversations_as_text(
    tmp_path: Path,
) -> None:
    build_tokenizer(tmp_path, chat_template=None)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    row = render_texts(find_texts("demo/commands", "eval"), plain).rows[0][0]
    assert row.num_supervised == row.num_tokens - 1
    assert "\n" in plain.decode(row.input_ids)


def test_a_recipe_names_both(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train, held = text_file(tmp_path / "a.jsonl", 20), text_file(tmp_path / "b.jsonl", 5, seed=1)
    recipe = tmp_path / "recipe.yaml"
    rows = f"data:\n  train: [{{path: {train}}}]\n  eval: [{{path: {held}}}]\n"
    recipe.write_text(f"model: {{name_or_path: x}}\n{rows}")
    texts, kept, found = texts_for(Named(str(recipe), None), tokenizer, seed=0)
    assert texts is not None
    assert (len(kept[0]), len(found.sequences)) == (20, 5)
    assert found.description == "data.eval of recipe.yaml"
    recipe.write_text(f"model: {{name_or_path: x}}\ndata:\n  train: [{{path: {train}}}]\n")
    with pytest.raises(DataError, match=r"names no source in data\.eval"):
        find_texts(str(recipe), "eval")
    recipe.write_text(recipe.read_text() + "  held_out: 5\n")
    _, kept, found = texts_for(Named(str(recipe), None), tokenizer, seed=0)
    assert len(found.sequences) == 5
    assert len(kept[0]) == 15


def test_sets_of_the_hub_are_known_by_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WikiText keeps paragraphs as rows; they are put together again."""
    train, test = text_file(tmp_path / "a.jsonl", 20), text_file(tmp_path / "b.jsonl", 5, seed=1)
    known = KnownSet(SourceSpec(path=str(train)), SourceSpec(path=str(test)), joined_rows=10)
    monkeypatch.setitem(texts_module.KNOWN_SETS, "wikitext2", known)
    texts, kept, held = texts_for(Named("WikiText2", None), tokenizer, seed=0)
    assert texts is not None
    assert (len(kept[0]), len(held.sequences)) == (2, 1)
    assert "\n\n" in tokenizer.decode(kept[0][0].input_ids)


def test_a_set_that_cannot_be_reached_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="is no local file, and the hub did not give"):
        texts_for(Named("c4", None), tokenizer, seed=0)


def test_a_file_that_is_missing_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"no-such\.jsonl"):
        texts_for(Named("no-such.jsonl", None), tokenizer, seed=0)
