"""What others put in attention's place, written from their papers, as operators: only to be measured beside ours."""

from benchmarks.peers import block_means, circular, grafting, kmeans, merged, pooled

__all__ = ["block_means", "circular", "grafting", "kmeans", "merged", "pooled"]
