"""The reports: of a run, and of an evaluation of any models. Each is one file that loads nothing."""
