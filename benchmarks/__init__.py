"""The cost of a swap, against loops written by hand. ``python -m benchmarks`` prints the tables."""
