"""Evaluation: suites of references and prompts, methods that generate images for them, metrics, and reports.

`evaluation` has the settings, `harness` generates and scores, `report` makes the page. `report/metrics.json` also
records what the scores depend on: calibration, the judges' errors, seeds and weights.
"""
