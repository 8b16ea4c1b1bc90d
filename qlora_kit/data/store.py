"""Rendered sequences in three flat files, read through the memory map.

`tokens.bin` holds the ids of all sequences one after the other (int32), `supervised.bin` a byte
for each that says whether it is a label, `index.npy` one record per sequence: where it ends, which
source of the recipe and which row it is, and its notes. So a data set of any size costs a run no
more memory than the pages it touches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

import numpy as np

from qlora_kit.data.sequences import IGNORE_INDEX, Block, TokenSequence

_RECORD = np.dtype(
    [
        ("end", np.int64),
        ("group", np.int32),
        ("source", np.int32),
        ("number", np.int64),
        ("notes", np.int32),
    ]
)
_TOKENS, _SUPERVISED, _INDEX, _TEXTS = "tokens.bin", "supervised.bin", "index.npy", "texts.json"


class StoreWriter:
    """Appends blocks of sequences to the files in a folder; use as a context."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._tokens = (folder / _TOKENS).open("wb")
        self._supervised = (folder / _SUPERVISED).open("wb")
        self._index: list[np.ndarray] = []
        self._sources: dict[str, int] = {}
        self._notes: dict[tuple[str, ...], int] = {}
        self._end = 0

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._tokens.close()
        self._supervised.close()
        if kind is None:
            index = np.concatenate([np.empty(0, _RECORD), *self._index])
            np.save(self._folder / _INDEX, index)
            texts = {"sources": list(self._sources), "notes": [list(one) for one in self._notes]}
            (self._folder / _TEXTS).write_text(json.dumps(texts), encoding="utf-8")

    def add(self, block: Block, groups: Sequence[int]) -> None:
        """`groups` are for each sequence the number of its source in the recipe."""
        self._tokens.write(block.ids.tobytes())
        self._supervised.write(block.supervised.tobytes())
        places = [origin.rpartition(":") for origin in block.origins]
        sources, notes = self._sources, self._notes
        index = np.empty(len(block), _RECORD)
        index["end"] = self._end + block.ends
        index["group"] = groups
        index["source"] = [sources.setdefault(one[0], len(sources)) for one in places]
        index["number"] = [int(one[2]) for one in places]
        index["notes"] = [notes.setdefault(one, len(notes)) for one in block.notes]
        self._index.append(index)
        self._end += len(block.ids)


class StoredSequences(Sequence[TokenSequence]):
    """Sequences of a store in some order, each read when it is asked for."""

    def __init__(self, folder: Path, order: np.ndarray | None = None):
        self._index = np.load(folder / _INDEX, mmap_mode="r")
        self._tokens = _flat(folder / _TOKENS, np.int32)
        self._supervised = _flat(folder / _SUPERVISED, np.bool_)
        texts = json.loads((folder / _TEXTS).read_text(encoding="utf-8"))
        self._sources: list[str] = texts["sources"]
        self._notes = [tuple(notes) for notes in texts["notes"]]
        self._order = np.arange(len(self._index)) if order is None else order

    def in_order(self, order: np.ndarray) -> StoredSequences:
        """The same store, with its sequences in another order, some of them or some again."""
        other = object.__new__(StoredSequences)
        other.__dict__.update(self.__dict__)
        other._order = order
        return other

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, item: int) -> TokenSequence: ...

    @overload
    def __getitem__(self, item: slice) -> Sequence[TokenSequence]: ...

    def __getitem__(self, item: int | slice) -> TokenSequence | Sequence[TokenSequence]:
        if isinstance(item, slice):
            return self.in_order(self._order[item])
        record = self._index[self._order[item]]
        start, end = self._bounds(int(self._order[item]))
        ids = self._tokens[start:end]
        labels = np.where(self._supervised[start:end], ids, IGNORE_INDEX)
        return TokenSequence(
            tuple(ids.tolist()),
            tuple(labels.tolist()),
            f"{self._sources[record['source']]}:{record['number']}",
            self._notes[record["notes"]],
        )

    def __iter__(self) -> Iterator[TokenSequence]:
        return (self[number] for number in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, in order; int64 of shape (len(self),)."""
        ends = np.asarray(self._index["end"])
        return np.diff(ends, prepend=0)[self._order]

    def groups(self) -> np.ndarray:
        """The source in the recipe that each sequence came from; int32 of shape (len(self),)."""
        return np.asarray(self._index["group"])[self._order]

    def rows(self) -> np.ndarray:
        """A number for the row that each sequence came from; int64 of shape (len(self),)."""
        pairs = np.stack([self._index["source"], self._index["number"]], axis=1)
        _, numbers = np.unique(pairs, axis=0, return_inverse=True)
        return numbers.reshape(-1)[self._order]

    def supervised(self) -> np.ndarray:
        """Supervised tokens of each sequence; int64 of shape (len(self),)."""
        ends = np.asarray(self._index["end"])
        sums = np.concatenate([[0], np.cumsum(self._supervised, dtype=np.int64)])
        counts: np.ndarray = np.diff(sums[ends], prepend=0)
        return counts[self._order]

    def fingerprint(self) -> str:
        """SHA-256 over every token, which are supervised, where sequences end, and the order."""
        digest = hashlib.sha256()
        for values in (self._tokens, self._supervised, np.ascontiguousarray(self._index["end"])):
            digest.update(np.asarray(values).view(np.uint8).data if len(values) else b"")
        digest.update(np.asarray(self._order, np.int64).tobytes())
        return digest.hexdigest()

    def _bounds(self, number: int) -> tuple[int, int]:
        start = int(self._index["end"][number - 1]) if number else 0
        return start, int(self._index["end"][number])


def is_whole(folder: Path) -> bool:
    """Whether the files of a store are there and of the lengths that its index says."""
    try:
        ends = np.load(folder / _INDEX, mmap_mode="r")["end"]
        num_tokens = int(ends[-1]) if len(ends) else 0
        sizes = [(folder / name).stat().st_size for name in (_TOKENS, _SUPERVISED)]
        json.loads((folder / _TEXTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError):
        return False
    return sizes == [4 * num_tokens, num_tokens]


def _flat(path: Path, dtype: type) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
