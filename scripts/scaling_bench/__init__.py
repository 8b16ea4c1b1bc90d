"""What `bench_scaling.py` is made of."""
