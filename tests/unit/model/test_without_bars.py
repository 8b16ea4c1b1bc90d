"""Bars of others are left out, and nothing else is."""

from __future__ import annotations

import sys

import pytest
from tqdm import tqdm

from qlora_kit.model.without_bars import without_bars


def test_bars_are_left_out_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with without_bars():
        print("before", file=sys.stderr)
        for _ in tqdm(range(3), desc="Applying quantization config", disable=False):
            pass
        for _ in tqdm((), desc="Compressing model", disable=False):
            pass
        print("10 % done | 3/4 [sic]\n", file=sys.stderr)
        sys.stderr.write("\rours: 1 of 3")
    print("after", file=sys.stderr)
    said = capsys.readouterr()
    assert said.err == "before\n10 % done | 3/4 [sic]\n\n\rours: 1 of 3after\n"
    assert said.out == ""
