"""What `python -m benchmarks SUITE` runs: each yields the rows of one table."""
