"""Measurements with commands of their own, `python -m benchmarks.studies.NAME`; each writes its table."""
