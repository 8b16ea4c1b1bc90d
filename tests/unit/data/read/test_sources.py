"""Which files a source consists of, and sources that are no files."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pytest

from qlora_kit.data.demo import NUM_ROWS
from qlora_kit.data.read import (
    BadRow,
    Row,
    SourceFile,
    files_left_out,
    read_source,
    source_files,
    source_fingerprint,
)
from qlora_kit.data.rows import Unreadable
from qlora_kit.recipe.data import SourceSpec

from .files import ROWS, good, lines, read, refusal, write

TEXT = lines(ROWS)


def names(path: str | Path, **fields: Any) -> list[str]:
    """The files of a folder, or of a pattern directly in one, relative to that folder."""
    root = (
        str(path) if Path(path).is_dir() else str(path)[: str(path).index("*")].rpartition("/")[0]
    )
    files = source_files(SourceSpec(path=str(path), **fields))
    return [os.path.relpath(file.name, root) for file in files]


def fill(folder: Path, *files: str) -> Path:
    for name in files:
        write(folder, name, TEXT)
    return folder


def test_what_is_known_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", TEXT)
    assert source_files(SourceSpec(path=path)) == (SourceFile(Path(path), path, "jsonl"),)
    packed = write(tmp_path, "b.jsonl", pa.compress(TEXT.encode(), "zstd", asbytes=True))
    expected = SourceFile(Path(packed), packed, "jsonl", "zstd")
    assert source_files(SourceSpec(path=packed)) == (expected,)


def test_an_origin_names_the_file_as_the_recipe_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "rows/a.jsonl")
    for path in ("rows", "rows/", "rows/*.jsonl", "./rows/a.jsonl"):
        assert read(path)[0].origin.removeprefix("./") == "rows/a.jsonl:1"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert good("~/rows/a.jsonl") == ROWS


def test_a_folder_is_read_in_order_without_its_papers(tmp_path: Path) -> None:
    kept = ["a.jsonl", "b/c.csv", "b/d.json", "e.txt", "f.parquet.gz", "z.jsonl.zst"]
    fill(tmp_path, *kept, "README.md", "LICENSE", "LICENSE.txt", "dataset_info.json", "state.json")
    fill(tmp_path, ".hidden.jsonl", ".cache/x.jsonl", ".gitattributes", "_SUCCESS", "convert.py")
    write(tmp_path, "b/c.csv", "text\none\n")
    write(tmp_path, "e.txt", "one")
    write(tmp_path, "f.parquet.gz", b"PAR1")
    assert names(tmp_path) == kept


def test_what_a_folder_leaves_out_is_told(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl", "b.xlsx", "README.md", "state.json", "c.jsonl.bak")
    no_data = [f"{name} (no data, by the name)" for name in ("b.xlsx", "c.jsonl.bak", "state.json")]
    assert list(files_left_out(SourceSpec(path=str(tmp_path)))) == no_data
    assert names(tmp_path) == ["a.jsonl"]


def test_files_without_a_split_beside_those_of_train_are_told(tmp_path: Path) -> None:
    fill(tmp_path, "train.jsonl", "more.jsonl", "test.jsonl")
    (told,) = files_left_out(SourceSpec(path=str(tmp_path)))
    assert told == "more.jsonl (the name has no split, and those of others have train)"
    assert files_left_out(SourceSpec(path=str(tmp_path), split="test")) == ()
    (tmp_path / "README.md").write_text("all")
    (told,) = files_left_out(SourceSpec(path=f"{tmp_path}/*"))
    assert told == f"{tmp_path}/README.md (no data, by the name)"
    assert names(tmp_path) == ["train.jsonl"]
    assert files_left_out(SourceSpec(path="demo/commands")) == ()


def test_papers_are_known_by_their_endings_too(tmp_path: Path) -> None:
    fill(tmp_path, "readme.jsonl", "notice.json.gz", "requirements.txt", "state.json", "a.jsonl")
    assert names(tmp_path) == ["a.jsonl", "notice.json.gz", "readme.jsonl"]
    (tmp_path / ".hidden.jsonl").write_text(TEXT)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / ".hidden.jsonl").write_text(TEXT)
    assert "it holds nothing, hidden files aside" in refusal(tmp_path / "sub")


def test_a_folder_without_data(tmp_path: Path) -> None:
    assert "is a folder without data files; it holds nothing" in refusal(tmp_path)
    fill(tmp_path, "README.md", "sub/notes.docx", *(f"{n}.xyz" for n in range(9)))
    told = refusal(tmp_path)
    assert "it holds 0.xyz, 1.xyz, 2.xyz, 3.xyz, 4.xyz and 6 more" in told


def test_links_to_folders_end(tmp_path: Path) -> None:
    fill(tmp_path, "rows/a.jsonl", "other/b.jsonl")
    (tmp_path / "rows" / "back").symlink_to(tmp_path / "rows")
    (tmp_path / "rows" / "on").symlink_to(tmp_path / "other")
    assert names(tmp_path / "rows") == ["a.jsonl", "on/b.jsonl"]


def test_a_file_in_a_folder_that_is_none(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl")
    os.mkfifo(tmp_path / "b.jsonl")
    assert "b.jsonl is a named pipe" in refusal(tmp_path)
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    assert "b.jsonl is a link to a file that is not there" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["a.jsonl", "b.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
        (["test.jsonl", "train.jsonl"], "train", ["train.jsonl"]),
        (["test.jsonl", "train.jsonl"], "test", ["test.jsonl"]),
        (["my-train-0001.jsonl", "my_dev.jsonl"], "validation", ["my_dev.jsonl"]),
        (["train.jsonl", "valid.jsonl"], "validation", ["valid.jsonl"]),
        (["train.jsonl", "valid.jsonl"], "dev", ["valid.jsonl"]),
        (["train.jsonl", "eval.jsonl"], "eval", ["eval.jsonl"]),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "test", ["test/a.jsonl"]),
        (["train/x/a.jsonl", "test/a.jsonl"], "train", ["train/x/a.jsonl"]),
        (["rows.jsonl", "test.jsonl"], "train", ["rows.jsonl"]),
        (["rows.jsonl", "test.jsonl", "train.jsonl"], "train", ["train.jsonl"]),
        (["train_sft.jsonl", "train_gen.jsonl"], "train_sft", ["train_sft.jsonl"]),
        (["contest.jsonl", "latest.jsonl"], "train", ["contest.jsonl", "latest.jsonl"]),
        (["Train.jsonl", "TEST.jsonl"], "train", ["Train.jsonl"]),
    ],
)
def test_splits_by_name(tmp_path: Path, files: list[str], split: str, expected: list[str]) -> None:
    assert names(fill(tmp_path, *files), split=split) == expected


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    fill(tmp_path, "dev.jsonl", "rows.jsonl")
    told = refusal(tmp_path, split="test")
    assert "has no split 'test'; by the names of its files it has train, validation." in told
    (tmp_path / "rows.jsonl").unlink()
    assert "has no split 'train'" in refusal(tmp_path)


def test_patterns(tmp_path: Path) -> None:
    fill(tmp_path, "a1.jsonl", "a2.jsonl", "b.jsonl", "sub/a3.jsonl", "README.md", "test.jsonl")
    assert names(f"{tmp_path}/a*.jsonl") == ["a1.jsonl", "a2.jsonl"]
    assert names(f"{tmp_path}/**/a*.jsonl") == ["a1.jsonl", "a2.jsonl", "sub/a3.jsonl"]
    assert len(names(f"{tmp_path}/*")) == 4
    assert names(f"{tmp_path}/*", split="test") == ["test.jsonl"]
    assert names(f"{tmp_path}/*test*") == ["test.jsonl"]
    told = refusal(f"{tmp_path}/c*.jsonl")
    assert f"no file fits {tmp_path}/c*.jsonl; {tmp_path} holds" in told
    assert "a1.jsonl" in told
    assert f"there is no folder {tmp_path}/none" in refusal(f"{tmp_path}/none/*.jsonl")
    assert "no file but folders fits" in refusal(f"{tmp_path}/s*b")


def test_a_name_with_a_pattern_in_it(tmp_path: Path) -> None:
    assert good(write(tmp_path, "rows[1].jsonl", TEXT)) == ROWS


@pytest.mark.parametrize(("max_rows", "count"), [(1, 1), (3, 3), (4, 4), (9, 7), (None, 7)])
def test_max_rows_counts_good_and_bad(tmp_path: Path, max_rows: int | None, count: int) -> None:
    write(tmp_path, "a.jsonl", TEXT + "{broken\n")
    write(tmp_path, "b.jsonl", TEXT)
    rows = read(tmp_path, max_rows=max_rows)
    assert len(rows) == count
    assert [number for number, row in enumerate(rows) if isinstance(row, BadRow)] in ([3], [])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", TEXT.encode() + b"\xff\xff"),
        ("a.json", b'[{"text": "one"}, {"text": "two"}, {"text": "three"}, {'),
        ("a.csv", b'text\none\ntwo\nthree\n"four'),
    ],
)
def test_what_stands_behind_max_rows_may_be_broken(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = write(tmp_path, name, content)
    assert good(path, max_rows=3) == ROWS
    assert "a." in refusal(path)


def test_rows_come_as_they_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", TEXT)
    rows = read_source(SourceSpec(path=path))
    assert next(rows) == Row(path, 1, ROWS[0])


def test_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "train.jsonl")
    told = refusal(tmp_path / "trian.jsonl")
    assert f"there is no file {tmp_path}/trian.jsonl; did you mean {tmp_path}/train.jsonl?" in told
    assert refusal(tmp_path / "nothing-like-it.txt").endswith("nothing-like-it.txt.")
    assert f"nor a folder {tmp_path}/sub" in refusal(tmp_path / "sub" / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert refusal("nothing-like-it.txt") == (
        f"there is no file nothing-like-it.txt; relative paths start in {tmp_path}."
    )


@pytest.mark.parametrize("path", ["./rows", "data/rows.csv", "A.JSONL", "a/b/c", "~/none", "a.pt"])
def test_what_looks_like_a_file_is_not_asked_of_the_hub(path: str) -> None:
    assert "there is no file" in refusal(path)


@pytest.mark.parametrize(
    "path", ["x" * 300 + ".jsonl", "a\0b.jsonl", "x" * 300, "~nobody-of-this-name/x.jsonl"]
)
def test_names_that_the_system_refuses(path: str) -> None:
    assert "cannot be looked up" in refusal(path)


def test_an_ending_that_is_not_known(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.dat", "a,b\n1,2\n")
    assert "has the ending .dat, and its content does not tell what it is" in refusal(path)
    assert good(path, format="csv") == [{"a": "1", "b": "2"}]


def test_a_fingerprint_stands_for_every_byte(tmp_path: Path) -> None:
    def digest(split: str = "train") -> str:
        return source_fingerprint(SourceSpec(path=str(tmp_path), split=split))

    fill(tmp_path, "a.jsonl")
    seen = [digest()]
    assert digest() == seen[0]
    fill(tmp_path, "b.jsonl")
    seen.append(digest())
    write(tmp_path, "b.jsonl", TEXT.replace("three", "thrEe"))
    seen.append(digest())
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    seen.append(digest())
    assert len(set(seen)) == 4
    train = source_fingerprint(SourceSpec(path="demo/commands"))
    assert train != source_fingerprint(SourceSpec(path="demo/commands", split="test"))


def test_the_demo() -> None:
    rows = read("demo/commands", split="test", max_rows=5)
    assert [row.origin for row in rows] == [f"demo/commands:{number}" for number in range(1, 6)]
    assert len(read("demo/commands", split="test")) == NUM_ROWS["test"]
    assert source_files(SourceSpec(path="demo/commands")) == ()
    assert "no built-in data set demo/comands" in refusal("demo/comands")
    assert "no split 'dev'" in refusal("demo/commands", split="dev")


def test_the_hub_is_asked_last_and_may_be_away() -> None:
    told = refusal("nobody/no-such-set")
    assert "nobody/no-such-set is no local file, and the hub did not give its split" in told
    assert told.endswith("Name a local file, or download it where there is a network.")
    assert "\n" not in told
    assert source_files(SourceSpec(path="nobody/no-such-set")) == ()


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    records = [{"a": "x", "b": None}, {"a": "y", "b": {"c": None, "d": [1]}}, {"a": b"z"}]

    def load(path: str, config: str | None, **options: Any) -> Any:
        asked.append((path, config, options))
        return records

    monkeypatch.setattr(datasets, "load_dataset", load)
    spec = SourceSpec(path="owner/name", split="dev", config="en")
    first, second, third = read_source(spec, streaming=True)
    assert (first, second) == (
        Row("owner/name", 1, {"a": "x", "b": None}),
        Row("owner/name", 2, {"a": "y", "b": {"d": [1]}}),
    )
    assert isinstance(third, Row)
    assert isinstance(third.record["a"], Unreadable)
    assert asked == [("owner/name", "en", {"split": "dev", "streaming": True})]


def test_the_hub_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield {"a": "x"}
        raise ConnectionError("gone\nmore")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    assert "broke off behind row 1: gone" in refusal("owner/name")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: SimpleNamespace(_fingerprint="f")
    )
    assert source_fingerprint(SourceSpec(path="owner/name")) == "f"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("banking77", 10_003),
        ("bfcl/BFCL_v4_simple_python.json", 400),
        ("fastchat", 500),
        ("preference", 299),
        ("snips/intent*", 4700),
        ("self-instruct", 427),
        ("zh", 1000),
    ],
)
def test_the_real_sets_are_read(shared_data: Path, name: str, count: int) -> None:
    assert len(good(shared_data / name)) == count


def test_real_text_is_read(shared_data: Path) -> None:
    (whole,) = good(shared_data / "wikitext-2" / "valid.txt")
    found = good(shared_data / "wikitext-2" / "valid.txt", text_rows="line")
    assert len(found) == sum(1 for line in whole["text"].split("\n") if line.strip())
