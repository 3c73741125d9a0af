"""What lies on disk: weights, their headers and kinds, pictures, YAML, names, atomic writes. Knows nothing of options or models."""
