"""What is stored comes back as it was, without being held in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_kit.data.sequences import IGNORE_INDEX, Block, TokenSequence
from qlora_kit.data.store import StoredSequences, StoreWriter


def sequence(ids: list[int], supervised: list[bool], origin: str, *notes: str) -> TokenSequence:
    labels = [one if yes else IGNORE_INDEX for one, yes in zip(ids, supervised, strict=True)]
    return TokenSequence(tuple(ids), tuple(labels), origin, tuple(notes))


ANY_SEQUENCE = st.lists(
    st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=6
).flatmap(
    lambda tokens: st.builds(
        lambda source, number, notes: sequence(
            [token for token, _ in tokens], [yes for _, yes in tokens], f"{source}:{number}", *notes
        ),
        st.sampled_from(["a.jsonl", "C:/rows:2/b é.jsonl", "demo/commands"]),
        st.integers(0, 2**40),
        st.lists(st.sampled_from(["merged", "rewritten é"]), max_size=2, unique=True),
    )
)


def stored(folder: Path, sequences: list[TokenSequence], groups: list[int]) -> StoredSequences:
    folder.mkdir(exist_ok=True)
    with StoreWriter(folder) as writer:
        for first in range(0, len(sequences), 2):
            part = slice(first, first + 2)
            writer.add(Block.of(sequences[part]), groups[part])
    return StoredSequences(folder)


@pytest.fixture
def three(tmp_path: Path) -> StoredSequences:
    return stored(
        tmp_path / "store",
        [
            sequence([5, 6, 7], [False, True, True], "a:1"),
            sequence([8], [False], "a:2", "odd"),
            sequence([0, 9], [False, True], "b:1"),
        ],
        [0, 0, 3],
    )


@settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sequences=st.lists(ANY_SEQUENCE, max_size=6))
def test_there_and_back(tmp_path: Path, sequences: list[TokenSequence]) -> None:
    store = stored(tmp_path / "store", sequences, list(range(len(sequences))))
    assert list(store) == sequences
    assert [store[number] for number in range(len(store))] == sequences
    assert store.lengths.tolist() == [one.num_tokens for one in sequences]
    assert store.groups().tolist() == list(range(len(sequences)))


def test_types_are_those_of_python(three: StoredSequences) -> None:
    """A numpy integer is no key of JSON and no member of a set of ids."""
    for one in three:
        assert {type(value) for value in (*one.input_ids, *one.labels)} == {int}
        assert isinstance(one.input_ids, tuple)
        assert isinstance(one.notes, tuple)


def test_another_order_leaves_out_and_repeats(three: StoredSequences) -> None:
    other = three.in_order(np.array([2, 0, 2]))
    assert [one.origin for one in other] == ["b:1", "a:1", "b:1"]
    assert other.lengths.tolist() == [2, 3, 2]
    assert other.groups().tolist() == [3, 0, 3]
    assert [one.origin for one in other.in_order(np.array([1]))] == ["a:2"]
    assert [one.origin for one in three] == ["a:1", "a:2", "b:1"]


@pytest.mark.parametrize("part", [slice(1, None), slice(None, None, -1), slice(5, 9), slice(-1)])
def test_slices(three: StoredSequences, part: slice) -> None:
    cut = three[part]
    assert isinstance(cut, StoredSequences)
    assert list(cut) == list(three)[part]
    assert cut.lengths.tolist() == three.lengths.tolist()[part]


def test_from_behind_and_beyond(three: StoredSequences) -> None:
    assert three[-1] == three[2]
    with pytest.raises(IndexError):
        three[3]
    assert list(three) == list(iter(three))


def test_empty(tmp_path: Path) -> None:
    store = stored(tmp_path / "store", [], [])
    assert len(store) == 0
    assert list(store) == []
    assert store.lengths.tolist() == []
    assert not store


def test_more_than_one_block_of_the_index(tmp_path: Path) -> None:
    count = 65536 + 3
    sequences = [sequence([number], [False], f"a:{number}") for number in range(count)]
    store = stored(tmp_path / "store", sequences, [0] * count)
    assert len(store) == count
    assert store[count - 1] == sequences[-1]
    assert store[65536] == sequences[65536]


def test_it_is_read_through_the_memory_map(tmp_path: Path) -> None:
    """What the file holds when a sequence is asked for counts, so nothing was read before."""
    store = stored(tmp_path / "store", [sequence([1, 2], [False, True], "a:1")] * 3, [0] * 3)
    path = tmp_path / "store" / "tokens.bin"
    with path.open("r+b") as file:
        file.seek(4 * 4)
        file.write(np.array([77], np.int32).tobytes())
    assert [one.input_ids for one in store] == [(1, 2), (1, 2), (77, 2)]
    assert all(isinstance(part, np.memmap) for part in (store._tokens, store._supervised))
    assert isinstance(store._index, np.memmap)


def test_it_takes_few_bytes(tmp_path: Path) -> None:
    stored(tmp_path / "store", [sequence([1] * 100, [True] * 100, "a:1")] * 50, [0] * 50)
    size = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
    assert size < 6 * 100 * 50, "five bytes for a token, and the index"


def test_what_fails_leaves_no_index(tmp_path: Path) -> None:
    def fail() -> None:
        with StoreWriter(tmp_path) as writer:
            writer.add(Block.of([sequence([1], [False], "a:1")]), [0])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not (tmp_path / "index.npy").exists()
