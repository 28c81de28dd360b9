"""Stage 1, write: prompts for grids, from a grammar or from a language model."""
