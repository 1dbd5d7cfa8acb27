"""What a swap costs, against what people write by hand. ``python -m benchmarks`` prints tables."""
