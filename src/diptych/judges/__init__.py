"""The judges: models that compare panels. `embedding` measures how similar two subjects are, `attributes` reads what an
image shows, and `vlm` answers a task's questions. The judge that curates pairs never scores the student."""
