"""Evaluation: suites of references and prompts, methods that answer them, metrics, and the report that shows it all.

`harness` draws and scores, `report.write` makes the page. Everything a number rests on (calibration, the
judges' own errors, seeds, weights) stands beside it in `report/metrics.json`.
"""
