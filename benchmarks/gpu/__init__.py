"""The GPU suite: one script for each case, `python -m benchmarks.gpu` for all of them."""
