"""Evaluation: suites of references and prompts, methods that answer them, metrics, and the report that shows it all.

`evaluation` is the config, `harness` draws and scores, `report` makes the page. What a number depends on (calibration,
the judges' own errors, seeds, weights) is beside it in `report/metrics.json`.
"""
