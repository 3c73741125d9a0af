"""Speed and memory: correctness is checked first, tables go to benchmarks/results with their circumstances."""
