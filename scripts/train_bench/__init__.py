"""The parts of `scripts/bench_train.py`: the work, the sides, how one is watched, the table."""
