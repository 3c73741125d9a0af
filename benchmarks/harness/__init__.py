"""How everything here is measured: correctness first, interleaved rounds, peak memory, a row, a record."""
