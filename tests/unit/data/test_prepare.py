"""Every row and every token is accounted for, and the model is taught to stop."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from qlora_kit.data.examples import Conversation, PlainText, PromptCompletion
from qlora_kit.data.fit import NOTHING_LEFT, NOTHING_SUPERVISED, OVERLENGTH
from qlora_kit.data.ledger import END_CUT, TRUNCATED
from qlora_kit.data.mark import NOTE_REWRITTEN
from qlora_kit.data.mixing import NOT_DRAWN
from qlora_kit.data.prepare import (
    UNWANTED,
    Part,
    prepare_eval,
    prepare_train,
    prove_end_of_turn,
    read_examples,
)
from qlora_kit.data.render import render, render_prompt
from qlora_kit.data.schemas import content_key
from qlora_kit.data.schemas.nulls import NOTE_NULL_WORD
from qlora_kit.data.schemas.preference import NOTE_REJECTED
from qlora_kit.data.select import DUPLICATE
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.data.spelled import NOTE_KEPT_AS_TEXT, NOTE_MADE_TOKEN, NOTE_SPELLED
from qlora_kit.environment import cache_dir
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSpec, SourceSpec

from .formats import CHATML, FORMATS, NO_END, R1, build, tokenizer_of

NO_ANSWER = "no answer"
REFUSED = "spells a special token in a tool or a call of one"
STOPS = frozenset({tokenizer_of("chatml").eos_token_id})


def talk(question: str, answer: str = "fine") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def write(folder: Path, rows: Iterable[dict[str, Any]], name: str = "rows.jsonl") -> SourceSpec:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceSpec(path=str(path))


def spec_of(source: SourceSpec, **values: Any) -> DataSpec:
    return DataSpec(train=(source,), **{"max_dropped_share": 1.0, **values})


def prepare(
    source: SourceSpec, tokenizer: PreTrainedTokenizerBase | None = None, **values: Any
) -> Part:
    tokenizer = tokenizer or tokenizer_of("chatml")
    stops = frozenset({tokenizer.eos_token_id})
    return prepare_train(spec_of(source, **values), tokenizer, stops)


def prepare_held(source: SourceSpec, **values: Any) -> Part:
    spec = DataSpec(
        train=(SourceSpec(path="demo/commands"),),
        eval=(source,),
        **{"max_dropped_share": 1.0, **values},
    )
    return prepare_eval(spec, tokenizer_of("chatml"), STOPS)


def calling(name: str) -> dict[str, Any]:
    """A row that the template could show, but for what it spells."""
    return {**talk("hello"), "tools": [{"name": name, "parameters": {}}]}


def tokens(part: Part) -> dict[str, int]:
    counted = part.ledger.as_dict()["tokens"]
    assert isinstance(counted, dict)
    return counted


def test_what_is_kept_whole(tmp_path: Path) -> None:
    source = write(tmp_path, [talk("hello"), talk("12", "you\n")])
    part = prepare(source)
    sequences = [
        render(one, tokenizer_of("chatml"), "assistant") for one in read_examples([source])
    ]
    assert list(part.sequences) == sequences
    assert part.num_supervised == sum(one.num_supervised for one in sequences)
    assert part.ledger.num_rows == part.ledger.num_kept == part.ledger.num_sequences == 2
    assert part.ledger.findings() == []
    assert part.ledger.num_lost == 0
    assert list(part.ledger.schemas) == [source.path]
    assert part.ledger.schemas[source.path].startswith("messages: ")
    length = sum(len(one.input_ids) for one in sequences)
    assert tokens(part) == {
        "rendered": length,
        "repeated": 0,
        "supervised": part.num_supervised,
        "context": length - part.num_supervised,
        "cut": 0,
        "dropped": 0,
        "undrawn": 0,
        "drawn_again": 0,
        "padding": 0,
    }


def test_only_an_eval_part_says_what_its_rows_say(tmp_path: Path) -> None:
    source = write(tmp_path, [talk("hello"), talk("12", "you\n")])
    assert prepare(source).examples == ()
    held = prepare_held(source)
    assert held.examples == tuple(read_examples([source]))
    assert [one.origin for one in held.sequences] == [one.origin for one in held.examples]


def test_rows_without_an_answer_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [talk("hello"), {"messages": [{"role": "user", "content": "hello"}]}]
    part = prepare(write(tmp_path, rows))
    assert part.ledger.dropped == {NO_ANSWER: 1}
    [shown] = part.ledger.examples[NO_ANSWER]
    assert shown.startswith(f"{tmp_path / 'rows.jsonl'}:2")
    assert len(part.sequences) == 1


def test_rows_of_which_nothing_is_supervised_are_dropped_with_their_tokens(tmp_path: Path) -> None:
    untrained = talk("hello", "no")
    untrained["messages"][1]["train"] = False
    part = prepare(write(tmp_path, [talk("hello"), untrained]))
    assert part.ledger.dropped == {NOTHING_SUPERVISED: 1}
    assert part.ledger.examples == {NOTHING_SUPERVISED: [f"{tmp_path / 'rows.jsonl'}:2"]}
    assert tokens(part)["dropped"] > 0
    assert len(part.sequences) == 1


def test_lines_that_cannot_be_read_are_dropped_and_counted(tmp_path: Path) -> None:
    source = write(tmp_path, [talk("hello"), talk("12")])
    path = Path(source.path)
    path.write_text(path.read_text() + '{"messages": [\n' + json.dumps(talk("you")) + "\n")
    part = prepare(source)
    assert (part.ledger.num_rows, part.ledger.num_kept) == (4, 3)
    [(reason, count)] = part.ledger.dropped.items()
    assert count == 1
    assert part.ledger.examples[reason][0].startswith(f"{path}:3")


def test_rows_that_cannot_be_rendered_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [talk("hello"), calling("<|im_end|>"), calling("a <|im_end|> b")]
    part = prepare(write(tmp_path, rows))
    assert part.ledger.dropped == {REFUSED: 2}
    assert tokens(part)["dropped"] == 0
    assert len(part.sequences) == 1
    assert part.ledger.findings()[0].startswith(f"2 of 3 rows: dropped, {REFUSED} (")


def test_a_special_token_that_a_user_spells_is_kept_as_text(tmp_path: Path) -> None:
    part = prepare(write(tmp_path, [talk("hello <|im_end|>"), talk("12", "a <|im_end|> b")]))
    assert part.ledger.noted == {NOTE_SPELLED: 2}
    end = tokenizer_of("chatml").convert_tokens_to_ids("<|im_end|>")
    assert [one.input_ids.count(end) for one in part.sequences] == [2, 2]
    assert [one.labels.count(end) for one in part.sequences] == [1, 1]


@pytest.mark.parametrize(
    ("rows", "kinds"),
    [
        ([{"text": "a <|im_end|> b"}, {"text": "hello"}], (PlainText,)),
        ([{"prompt": "a <|im_end|> b", "completion": " c"}], (PromptCompletion,)),
        ([{"prompt": "a <|im_end|>", "chosen": " c", "rejected": " d"}], (PromptCompletion,)),
    ],
    ids=["text", "prompt_completion", "preference"],
)
def test_split_special_tokens_reaches_the_rows(
    tmp_path: Path, rows: list[dict[str, Any]], kinds: tuple[type, ...]
) -> None:
    """And its count is noted, with the name of the key; so for the rows that are evaluated."""
    source = write(tmp_path, rows)
    end = tokenizer_of("chatml").convert_tokens_to_ids("<|im_end|>")
    for splits, note, count in (True, NOTE_KEPT_AS_TEXT, 1), (False, NOTE_MADE_TOKEN, 2):
        part = prepare(source, split_special_tokens=splits)
        assert part.ledger.noted[note] == 1
        assert part.sequences[0].input_ids.count(end) == count
        assert any("data.split_special_tokens" in one for one in part.ledger.findings())
        held = prepare_held(source, split_special_tokens=splits)
        assert held.ledger.noted[note] == 1
        assert isinstance(held.examples[0], kinds)
        assert held.examples[0].split_special_tokens is splits


@pytest.mark.parametrize("mix", ["concatenate", "first_exhausted", "all_exhausted"])
def test_a_source_that_duplicates_empty_is_named(tmp_path: Path, mix: str) -> None:
    """In a mix its weight would otherwise draw few rows very often, or none, without a word."""
    texts = [f"hello {number}" for number in range(10)]
    first = write(tmp_path, map(talk, texts), "a.jsonl")
    for num_shared, is_named in (10, True), (6, True), (5, False):
        others = [*texts[:num_shared], *(f"you {number}" for number in range(10 - num_shared))]
        second = write(tmp_path, map(talk, others), "b.jsonl")
        spec = DataSpec(train=(first, second), mix=mix, max_dropped_share=1.0)
        findings = prepare_train(spec, tokenizer_of("chatml"), STOPS).ledger.findings()
        said = (
            f"{num_shared} of the 10 rows of {second.path} are the same as earlier ones "
            f"({num_shared} of {first.path}): at most {10 - num_shared} are left"
        )
        assert [one for one in findings if "at most" in one and not one.startswith(said)] == []
        assert any(one.startswith(said) for one in findings) == is_named
    again = prepare_train(
        spec.model_copy(update={"duplicates": "keep"}), tokenizer_of("chatml"), STOPS
    )
    assert not any("at most" in one for one in again.ledger.findings())


def test_a_missing_value_that_was_exported_as_a_word_is_kept_and_noted(tmp_path: Path) -> None:
    rows = [talk("hello"), talk("12", "None"), talk("you", " nan "), talk("a", "None of it")]
    part = prepare(write(tmp_path, rows))
    assert (part.ledger.num_kept, part.ledger.noted) == (4, {NOTE_NULL_WORD: 2})
    [finding] = part.ledger.findings()
    assert finding.startswith("2 of 4 rows: a whole text is None, nan, null")
    assert f"{tmp_path / 'rows.jsonl'}:2, {tmp_path / 'rows.jsonl'}:3" in finding


def test_duplicates_are_set_aside_and_are_no_loss(tmp_path: Path) -> None:
    rows = [talk("hello"), talk("12"), talk("hello"), talk("hello")]
    part = prepare(write(tmp_path, rows), max_dropped_share=0.0)
    assert part.ledger.set_aside == {DUPLICATE: 2}
    assert part.ledger.num_lost == 0
    assert len(prepare(write(tmp_path, rows), duplicates="keep").sequences) == 4
    with pytest.raises(DataError, match=r":3 is the same as .*:1, and data.duplicates is error"):
        prepare(write(tmp_path, rows), duplicates="error")


def test_of_pairs_the_chosen_is_trained_and_of_rated_answers_the_wanted(tmp_path: Path) -> None:
    pair = {"prompt": "hello", "chosen": "fine", "rejected": "no"}
    long = {"prompt": "hello", "chosen": "fine " * 50, "rejected": "no"}
    part = prepare(write(tmp_path, [pair, long]), max_length=32)
    [sequence] = part.sequences
    assert "fine" in tokenizer_of("chatml").decode(sequence.input_ids)
    assert "no" not in tokenizer_of("chatml").decode(sequence.input_ids)
    assert part.ledger.dropped == {OVERLENGTH: 1}
    assert part.ledger.noted == {NOTE_REJECTED: 1}  # of what is kept
    rated = [
        {"prompt": "hello", "completion": "fine", "label": True},
        {"prompt": "hello", "completion": "no", "label": False},
    ]
    part = prepare(write(tmp_path, rated))
    assert part.ledger.set_aside == {UNWANTED: 1}
    assert len(part.sequences) == 1


def test_rows_that_are_too_long_are_dropped_and_counted(tmp_path: Path) -> None:
    source = write(tmp_path, [talk("hello"), talk("hello " * 60)])
    part = prepare(source, max_length=64)
    assert part.ledger.dropped == {OVERLENGTH: 1}
    assert len(part.sequences) == 1
    whole = prepare(source)
    assert tokens(part)["dropped"] == len(whole.sequences[1].input_ids)
    assert tokens(part)["rendered"] == tokens(whole)["rendered"]
    assert len(prepare_held(source, max_length=64).examples) == 2


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_the_limit_is_the_last_length_that_fits(tmp_path: Path, excess: int) -> None:
    source = write(tmp_path, [talk("hello"), talk("hello how are you")])
    longest = max(len(one.input_ids) for one in prepare(source).sequences)
    part = prepare(source, max_length=longest + excess)
    assert part.ledger.dropped == ({} if excess >= 0 else {OVERLENGTH: 1})


def test_an_answer_cut_in_the_middle_has_no_end_and_that_is_counted(tmp_path: Path) -> None:
    source = write(tmp_path, [talk("hello", "fine " * 20), talk("hello")])
    (long, short) = prepare(source).sequences
    max_length = len(long.input_ids) - 5
    part = prepare(source, max_length=max_length, overlength="truncate")
    assert list(part.sequences) == [
        TokenSequence(long.input_ids[:max_length], long.labels[:max_length], long.origin),
        short,
    ]
    assert (part.ledger.truncated, part.ledger.ends_cut, part.ledger.num_lost) == (1, 1, 1)
    assert tokens(part)["cut"] == 5
    origin = f"{tmp_path / 'rows.jsonl'}:1"
    length = len(long.input_ids)
    assert part.ledger.examples == {TRUNCATED: [f"{origin} ({length} tokens)"], END_CUT: [origin]}
    assert END_CUT in " ".join(part.ledger.findings())


def test_what_is_cut_behind_the_end_of_an_answer_is_no_lost_end(tmp_path: Path) -> None:
    more = talk("how are you " * 20)["messages"]
    more[1]["train"] = False
    source = write(tmp_path, [{"messages": [*talk("hello")["messages"], *more]}])
    (sequence,) = prepare(source).sequences
    end = max(place for place, label in enumerate(sequence.labels) if label != IGNORE_INDEX)
    for max_length, ends_cut in ((end, 1), (end + 1, 0), (end + 2, 0)):
        part = prepare(source, max_length=max_length, overlength="truncate")
        assert (part.ledger.truncated, part.ledger.ends_cut) == (1, ends_cut)


def test_a_cut_right_before_an_answer_loses_all_of_it_and_no_end(tmp_path: Path) -> None:
    more = [*talk("hello")["messages"], *talk("12", "fine " * 20)["messages"]]
    source = write(tmp_path, [{"messages": more}])
    (sequence,) = prepare(source).sequences
    places = [place for place, label in enumerate(sequence.labels) if label != IGNORE_INDEX]
    start = next(b for a, b in pairwise(places) if b > a + 1)
    for max_length, ends_cut in ((start, 0), (start + 1, 1)):
        part = prepare(source, max_length=max_length, overlength="truncate")
        assert (part.ledger.truncated, part.ledger.ends_cut) == (1, ends_cut)


def test_a_row_cut_before_its_answer_is_dropped_and_booked_once(tmp_path: Path) -> None:
    source = write(tmp_path, [talk("hello " * 30), talk("hello")])
    part = prepare(source, max_length=32, overlength="truncate")
    assert part.ledger.dropped == {NOTHING_LEFT: 1}
    assert (part.ledger.truncated, part.ledger.num_lost) == (0, 1)
    assert tokens(part)["cut"] == 0
    assert tokens(part)["dropped"] == len(prepare(source).sequences[0].input_ids)


def test_an_answer_beyond_the_limit_is_an_error_where_asked(tmp_path: Path) -> None:
    source = write(tmp_path, [talk("hello"), talk("hello " * 60)])
    with pytest.raises(DataError) as caught:
        prepare(source, max_length=64, overlength="error")
    message = str(caught.value)
    assert "1 of 2 rows are longer than data.max_length, 64 tokens" in message
    assert f"{tmp_path / 'rows.jsonl'}:2" in message
    assert "data.overlength is error" in message


def test_that_error_is_about_length_alone(tmp_path: Path) -> None:
    source = write(tmp_path, [talk("hello"), calling("<|im_end|>")])
    part = prepare(source, overlength="error")
    assert part.ledger.dropped == {REFUSED: 1}
    with pytest.raises(DataError, match=r"more than the 1\.0% allowed") as caught:
        prepare(source, overlength="error", max_dropped_share=0.01)
    assert "max_length" not in str(caught.value)


@pytest.mark.parametrize(("share", "allowed"), [(0.0, False), (0.24, False), (0.25, True)])
def test_losses_beyond_the_allowed_share(tmp_path: Path, share: float, allowed: bool) -> None:
    """The message says how many, why, and where to look; to truncate is the recipe's own word."""
    rows = [talk("hello"), talk("hello", "how are you " * 9), talk("12"), talk("you")]
    source, values = write(tmp_path, rows), {"max_length": 40}
    cut = prepare(source, **values, overlength="truncate", max_dropped_share=share)
    assert cut.ledger.truncated == 1
    if allowed:
        assert prepare(source, **values, max_dropped_share=share).ledger.num_lost == 1
        return
    with pytest.raises(DataError) as caught:
        prepare(source, **values, max_dropped_share=share)
    message = str(caught.value)
    assert "data.train: 1 of 4 rows (25.0%) would be dropped" in message
    assert f"more than the {share:.1%} allowed" in message
    assert f"{tmp_path / 'rows.jsonl'}:2" in message
    assert "raise data.max_length (now 40) or data.max_dropped_share" in message


def test_nothing_to_train_on(tmp_path: Path) -> None:
    """Whatever share may be dropped, all of it may not."""
    source = write(
        tmp_path, [{"messages": [{"role": "user", "content": "hello"}]}, calling("</s>")]
    )
    with pytest.raises(DataError, match="no row was kept") as caught:
        prepare(source, tokenizer_of("mistral"))
    message = str(caught.value)
    assert f"1 of 2 rows: dropped, {NO_ANSWER} ({tmp_path / 'rows.jsonl'}:1" in message
    assert f"dropped, {REFUSED}" in message


def test_a_long_text_is_split_and_loses_nothing(tmp_path: Path) -> None:
    text = "the quick brown fox 12 " * 20
    source = write(tmp_path, [{"text": text}, {"text": "hello"}, {"text": " "}])
    (whole, short) = prepare(source).sequences
    for max_length in (8, 9, 64, len(whole.input_ids) - 1):
        part = prepare(source, max_length=max_length, overlength="error")
        *pieces, last = part.sequences
        assert last == short
        assert all(2 <= len(piece.input_ids) <= max_length for piece in pieces)
        assert all(piece.num_supervised == len(piece.input_ids) - 1 for piece in pieces)
        ids = [token for piece in pieces for token in piece.input_ids[1:]]
        assert (whole.input_ids[0], *ids) == whole.input_ids
        assert part.num_supervised == whole.num_supervised + short.num_supervised
        assert (part.ledger.split, part.ledger.num_lost) == (1, 1)
        assert tokens(part)["repeated"] == len(pieces) - 1


def test_what_is_known_of_kept_rows_is_counted(tmp_path: Path) -> None:
    rows = [{"messages": talk("hello")["messages"] * 2}, talk("hello")]
    part = prepare(write(tmp_path, rows), tokenizer_of("qwen3"))
    assert part.ledger.noted == {NOTE_REWRITTEN: 1}
    assert part.ledger.num_lost == 0
    assert NOTE_REWRITTEN in part.ledger.examples


WORDS = st.lists(st.sampled_from(["hello", "fine", "12", "é🙂", "<|im_end|>", "\n"]), max_size=12)
ANY_ROW = st.one_of(
    st.builds(lambda a, b: talk(" ".join(a), " ".join(b)), WORDS, WORDS),
    st.builds(lambda a: {"messages": [{"role": "user", "content": " ".join(a)}]}, WORDS),
)
ANY_TEXT = st.builds(lambda words: {"text": " ".join(words)}, WORDS)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rows=st.lists(ANY_ROW, max_size=6).map(lambda rows: [*rows, talk("12", "7")])
    | st.lists(ANY_TEXT, max_size=6).map(lambda rows: [*rows, {"text": "12"}]),
    max_length=st.integers(24, 60),
    overlength=st.sampled_from(["drop", "truncate", "split"]),
    loss_on=st.sampled_from(["assistant", "all"]),
)
def test_the_books_balance(
    tmp_path: Path, rows: list[dict[str, Any]], max_length: int, overlength: str, loss_on: str
) -> None:
    source = write(tmp_path, rows)
    part = prepare(source, max_length=max_length, overlength=overlength, loss_on=loss_on)
    ledger = part.ledger
    out = sum(ledger.dropped.values()) + sum(ledger.set_aside.values())
    assert ledger.num_rows == len(rows) == ledger.num_kept + out
    assert ledger.num_sequences == len(part.sequences)
    assert all(len(one.input_ids) <= max_length for one in part.sequences)
    assert all(one.num_supervised for one in part.sequences)
    assert ledger.supervised_tokens == sum(one.num_supervised for one in part.sequences)
    assert ledger.supervised_tokens + ledger.context_tokens == sum(
        len(one.input_ids) for one in part.sequences
    )
    different = {content_key(one): one for one in read_examples([source], loss_on != "all")}
    rendered = [render(one, tokenizer_of("chatml"), loss_on) for one in different.values()]
    assert ledger.rendered_tokens == sum(len(one.input_ids) for one in rendered)


def test_several_sources_keep_their_order(tmp_path: Path) -> None:
    sources = (
        write(tmp_path, [talk("hello"), talk("12")], "b.jsonl"),
        write(tmp_path, [{"text": "one"}], "a.jsonl"),
        SourceSpec(path="demo/commands", split="test", max_rows=2),
    )
    origins = [example.origin for example in read_examples(sources)]
    b, a = tmp_path / "b.jsonl", tmp_path / "a.jsonl"
    assert origins == [f"{b}:1", f"{b}:2", f"{a}:1", "demo/commands:1", "demo/commands:2"]


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_end_of_a_turn_is_proved(name: str, loss_on: str) -> None:
    tokenizer = tokenizer_of(name)
    end = tokenizer.convert_tokens_to_ids(FORMATS[name].end)
    assert prove_end_of_turn(tokenizer, frozenset({end, 7}), loss_on) == end
    with pytest.raises(DataError, match="the tuned model would not stop") as caught:
        prove_end_of_turn(tokenizer, frozenset({end + 1}), loss_on)
    assert f"ends a turn with {FORMATS[name].end}" in str(caught.value)
    with pytest.raises(DataError, match="generation stops only at nothing"):
        prove_end_of_turn(tokenizer, frozenset(), loss_on)


def test_a_template_that_never_ends_a_turn_stops_the_run(tmp_path: Path) -> None:
    source = write(tmp_path, [talk("hello")])
    for loss_on in ("assistant", "all"):
        with pytest.raises(DataError, match="would never learn to stop"):
            prepare(source, build(template=NO_END), loss_on=loss_on)
    with pytest.raises(DataError, match="the tuned model would not stop"):
        prepare(source, build(template=CHATML.replace("<|im_end|>", "<|endoftext|>")))


def test_a_prompt_unlike_any_answer_stops_the_run_unless_all_is_trained(tmp_path: Path) -> None:
    source = write(tmp_path, [talk("hello")])
    with pytest.raises(DataError, match="is not how an answered turn begins"):
        prepare(source, build(template=R1))
    assert prepare(source, build(template=R1), loss_on="all").num_supervised


def test_rows_without_a_template_need_no_end_of_turn(tmp_path: Path) -> None:
    source = write(tmp_path, [{"prompt": "hello", "completion": " fine"}])
    assert prepare(source, build(template=None)).num_supervised
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        prepare(write(tmp_path, [talk("hello")]), build(template=None))


def test_an_empty_part() -> None:
    assert Part.empty().num_supervised == 0
    Part.empty().ledger.check_balance()


SETS = {
    "snips/intent_train.jsonl": 4000,
    "snips/intent_valid.jsonl": 700,
    "snips/slots_train.jsonl": 4000,
    "snips/slots_valid.jsonl": 700,
    "zh/alpaca_zh_demo.json": 1000,
}


@pytest.mark.parametrize("name", SETS)
def test_real_conversations(shared_data: Path, name: str) -> None:
    """Every row is read; of the first of them, every answer is supervised as it stands."""
    source = SourceSpec(path=str(shared_data / name))
    assert len(list(read_examples((source,)))) == SETS[name]
    tokenizer = tokenizer_of("chatml")
    part = prepare_held(SourceSpec(path=source.path, max_rows=150), max_length=8192)
    assert part.ledger.num_kept == 150
    for example, sequence in zip(part.examples, part.sequences, strict=True):
        assert isinstance(example, Conversation)
        supervised = [label for label in sequence.labels if label != IGNORE_INDEX]
        assert tokenizer.decode(supervised) == example.messages[-1].content + "<|im_end|>"
        prompt = render_prompt(example, tokenizer)
        assert prompt is not None
        assert sequence.input_ids[: len(prompt.input_ids)] == prompt.input_ids
        assert prompt.reference == example.messages[-1].content.strip()


def test_real_instructions(shared_data: Path, tmp_path: Path) -> None:
    """Nested instances are not read; one row for each is."""
    name = shared_data / "self-instruct" / "seed_tasks.jsonl"
    with pytest.raises(DataError, match="'instances'"):
        list(read_examples((SourceSpec(path=str(name)),)))
    tasks = [json.loads(line) for line in name.read_text().splitlines()]
    rows = [
        {"instruction": task["instruction"], **instance}
        for task in tasks
        for instance in task["instances"]
    ]
    part = prepare(write(tmp_path, rows), max_length=8192)
    assert part.ledger.num_rows == part.ledger.num_kept == len(rows) >= len(tasks)


def test_real_text(shared_data: Path, tmp_path: Path) -> None:
    for path in sorted((shared_data / "wikitext-2").glob("*.txt")):
        assert list(read_examples((SourceSpec(path=str(path)),))) == [
            PlainText(path.read_text(), f"{path}:1"),
        ]
    text = path.read_text()[:50_000]
    (tmp_path / "some.txt").write_text(text)
    part = prepare(SourceSpec(path=str(tmp_path / "some.txt")), max_length=1024)
    assert part.ledger.split == 1
    assert part.ledger.num_sequences > 20
    ids = [part.sequences[0].input_ids[0]]
    ids += [token for one in part.sequences for token in one.input_ids[1:]]
    assert tokenizer_of("chatml").decode(ids) == text + "<|im_end|>"
    assert part.num_supervised == len(ids) - 1


MORE_SETS = {
    "fastchat/dummy_conversation.json": {},
    "preference/dpo_en_demo.json": {},
    "banking77/train.csv": {"type": "label"},
}


@pytest.mark.parametrize("name", MORE_SETS)
def test_real_rows_of_other_schemas(shared_data: Path, name: str) -> None:
    source = SourceSpec(path=str(shared_data / name), max_rows=50, **MORE_SETS[name])
    tokenizer = tokenizer_of("chatml")
    stops = frozenset({tokenizer.eos_token_id})
    spec = spec_of(source, max_length=8192, max_dropped_share=0.01)
    part = prepare_train(spec, tokenizer, stops)
    assert part.ledger.num_kept + sum(part.ledger.set_aside.values()) == 50
    assert all(one.num_supervised for one in part.sequences)


def test_rows_that_are_not_drawn_have_a_bucket(tmp_path: Path) -> None:
    rows = [talk(f"hello {number}") for number in range(10)]
    source = write(tmp_path, rows)
    some = prepare(source.model_copy(update={"num_rows": 3}))
    assert len(some.sequences) == some.ledger.num_kept == 3
    assert some.ledger.set_aside == {NOT_DRAWN: 7}
    assert some.ledger.supervised_tokens == sum(one.num_supervised for one in some.sequences)
    more = prepare(source.model_copy(update={"num_rows": 25}))
    assert len(more.sequences) == 25
    assert more.ledger.num_kept == 10
    once = more.ledger.supervised_tokens + more.ledger.context_tokens
    assert sum(one.num_tokens for one in more.sequences) == once + more.ledger.redrawn_tokens


def test_a_source_that_is_named_twice_gives_its_rows_once(tmp_path: Path) -> None:
    source = write(tmp_path, [talk("hello"), talk("you")])
    part = prepare_train(DataSpec(train=(source, source)), tokenizer_of("chatml"), STOPS)
    assert part.ledger.num_kept == 2
    assert sum(part.ledger.set_aside.values()) == 2


def test_a_damaged_cache_entry_is_made_anew(tmp_path: Path) -> None:
    source = write(tmp_path, [talk("hello"), talk("you")])
    entries = set((cache_dir() / "data").glob("*/tokens.bin"))
    before = [one.input_ids for one in prepare(source).sequences]
    [tokens] = set((cache_dir() / "data").glob("*/tokens.bin")) - entries
    tokens.write_bytes(tokens.read_bytes()[:-8])
    assert [one.input_ids for one in prepare(source).sequences] == before
