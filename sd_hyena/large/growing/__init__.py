"""Ways to draw larger than a model was trained: each stands around a pipeline. Knows nothing of students, configs, the engine."""
