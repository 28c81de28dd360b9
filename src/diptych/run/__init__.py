"""A run of a recipe: its stages in order, resuming, reuse of an earlier run, other thresholds, and its cost."""
