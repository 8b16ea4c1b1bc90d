"""A shape of `bench_scaling.py`, from its model to what was measured and what `plan` says of it."""

from __future__ import annotations

import bench_scaling
from plan_bench.cases import case


def test_a_shape_is_trained_and_told() -> None:
    tiny = case("tiny", "llama", 64, 128, 2, 2, 2, 512, 64, 2, 4)
    measured, told = bench_scaling.run(tiny, 4, threads=1, predicts=True)
    assert measured["cpu_seconds"] > 0
    assert told is not None
    assert 0 < told["tensors"] < told["process"]
    assert 0.5 < told["process"] / measured["process"] < 2
