"""Speed and memory. Each file is one command, checks correctness first, and writes its table to benchmarks/results."""
