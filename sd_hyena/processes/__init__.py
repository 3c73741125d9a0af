"""Several processes that work together, and the memory they take. Knows nothing of what they compute."""
