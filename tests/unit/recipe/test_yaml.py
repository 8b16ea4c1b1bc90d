"""YAML as recipes use it: what each value reads as, and that no file can do harm."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.errors import Fault, RecipeError
from qlora_kit.recipe.yaml import MAX_DEPTH, MAX_VALUES, dump_yaml, parse_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGED_LAUGHS = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)
)


def faults_of(text: str) -> list[Fault]:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "x.yaml")
    return caught.value.faults


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2E+4", 2e4),
        ("2.0e-4", 2e-4),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.inf", float("-inf")),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        ("010", 10),
        ("-7", -7),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("._", "._"),
        ("e5", "e5"),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("", None),
        ("!!float 5", 5.0),
        ("!!str 5", "5"),
    ],
)
def test_what_a_value_reads_as(text: str, value: object) -> None:
    read = parse_yaml(text, "x.yaml")
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_number() -> None:
    read = parse_yaml(".nan", "x.yaml")
    assert isinstance(read, float)
    assert read != read


def test_anchors_and_merge_keys() -> None:
    values = parse_yaml("a: &x {r: 8}\nb: {<<: *x, s: 9}\nc: {<<: *x, r: 1}", "x.yaml")
    assert values == {"a": {"r": 8}, "b": {"r": 8, "s": 9}, "c": {"r": 1}}


def test_a_merge_into_a_merged_mapping_is_no_duplicate() -> None:
    text = "z: &z {r: 1}\na: &a {<<: *z, r: 2}\nb: {<<: *a, r: 3}"
    assert parse_yaml(text, "x.yaml")["b"] == {"r": 3}


def test_aliases_share_nothing() -> None:
    values = parse_yaml("a: &x [{k: 1}]\nb: *x", "x.yaml")
    values["a"][0]["k"] = 2
    assert values["b"] == [{"k": 1}]


@pytest.mark.parametrize(
    ("text", "path", "piece"),
    [
        ("a: 1\na: 2", "a", "line 2: already set on line 1"),
        ("a: {b: 1}\nc:\n  d: 1\n  e: 2\n  d: 3", "c.d", "line 5: already set on line 3"),
        ("a:\n\tb: 1", "", "indent with spaces, not tabs"),
        ("a: b: c", "", "in quotes"),
        ("a: [1", "", "close the bracket"),
        ("a: 'x", "", "close the quote"),
        ("a: @x", "", "put the value in quotes"),
        ("a: *x", "", "undefined alias"),
        ("a: 1\n---\nb: 2", "", "one document"),
        ("a:\n  b: 1\n c: 2", "", "line 3"),
        ("1: 2", "1", "not text"),
        ("on: 2", "on", "not text"),
        ("? [a]\n: 2", "", "a key must be text"),
        ("a: !!python/object:os.system {}", "a", "the tag !!python/object:os.system"),
        ("a: !!binary aGk=", "a", "the tag !!binary"),
        ("a: !!int x", "a", "tagged as int"),
        ("a: !!bool x", "a", "tagged as bool"),
        ("a: !mine 5", "a", "the tag !mine"),
        ('a: "\\ud800"', "a", "surrogate"),
        ('a: "\\0"', "a", "NUL"),
        ("a: '\0'", "", "control character"),
        ("a: " + "9" * 5000, "a", "5000 digits"),
        ("a: &x [*x]", "a.0", "leads back into itself"),
        ("a: &x {b: {c: *x}}", "a.b.c", "leads back into itself"),
        ("[" * 50_000, "", "too deeply"),
        ("{a: " * 5_000, "", "too deeply"),
        ("- " * 5_000, "", "too deeply"),
        (LAUGHS, "", f"{MAX_VALUES:,} values"),
        (MERGED_LAUGHS, "", f"{MAX_VALUES:,} values"),
    ],
)
def test_what_is_refused(text: str, path: str, piece: str) -> None:
    start = time.process_time()
    (fault,) = faults_of(text)
    assert fault.path == path
    assert piece in str(fault)
    assert time.process_time() - start < 5


def test_nesting_through_aliases_is_limited_too() -> None:
    text = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, MAX_DEPTH + 1))
    assert {fault.message.partition(": ")[2] for fault in faults_of(text)} == {
        "is nested too deeply"
    }


def test_every_duplicate_is_reported_at_once() -> None:
    faults = faults_of("a: {x: 1, x: 2}\nb: {y: 1, y: 2}\na: 3")
    assert [fault.path for fault in faults] == ["a", "a.x", "b.y"]


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]))
    | st.sampled_from(["1e5", "2e-4", "1_0", "yes", "no", "2024-01-01", "1:30", "=", "<<", "~"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs", "Cc"])), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(plain)
@settings(max_examples=100, deadline=None)
def test_what_is_dumped_reads_back(values: object) -> None:
    read = parse_yaml(dump_yaml(values), "x.yaml")
    assert read == values
    assert type(read) is type(values)
