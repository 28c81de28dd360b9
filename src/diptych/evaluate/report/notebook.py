"""Runs and evaluations in a notebook: parts of their reports, which Jupyter shows.

    report = Report("runs/first")  # or the folder of `diptych evaluate --suite`
    report                         # the result, and the size of each stage's output
    report.grids(4)
    report.funnel()

Each part is made when it is called, so that an unfinished run shows what it has so far.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from diptych import recipe as recipes
from diptych.errors import UsageError
from diptych.evaluate.evaluation import Evaluation
from diptych.evaluate.report import galleries, run_report, suite_report
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.render import FOLDER, part


class Section:
    """HTML with the style of the reports. In a terminal it is its text."""

    def __init__(self, html: str) -> None:
        self.html = str(html)

    def _repr_html_(self) -> str:
        return f'<div class="diptych-report"><style>{style()}</style>{self.html}</div>'

    def __repr__(self) -> str:
        from markupsafe import Markup

        text = re.sub(r"<svg.*?</svg>|<style.*?</style>", " ", self.html, flags=re.DOTALL)
        return " ".join(Markup(re.sub(r"<(?!/?(b|em|strong|i)\b)", " <", text)).striptags().split())


class Report:
    """The report of a run or of an evaluation on a suite."""

    def __init__(self, folder: str | Path) -> None:
        """`folder` is a run, or the output of `diptych evaluate --suite`. UsageError if it is neither."""
        path = Path(folder).expanduser()
        self.suite = not (path / "recipe.yaml").is_file()
        recipe = Evaluation().recipe() if self.suite else recipes.load(path / "recipe.yaml")
        self.run = Run(recipe, path)
        if self.suite and not self.run.metrics:
            raise UsageError(
                "path_not_found",
                f"{folder} is not a run and has no scores. Pass a run's folder, or the --out of diptych evaluate.",
            )

    def _repr_html_(self) -> str:
        return self.header()._repr_html_()

    def __repr__(self) -> str:
        return repr(self.header())

    def header(self) -> Section:
        """The result in a few sentences; of a run also the size of each stage's output."""
        result = self.run.metrics
        if self.suite:
            given = {"result": result, "headline": suite_report.headline(result)}
            return Section(part("suite.html.j2", "header", **given))
        return self._guarded("header", run_report.header)

    def grids(self, count: int = 6) -> Section:
        """The first grids of the teacher."""
        return self._guarded("paint", lambda run: {"run": run, "rows": run.first("grids", count)})

    def funnel(self) -> Section:
        """How many rows each step of curation left, and why it rejected the others."""
        reasons = Counter(row["reason"] for row in self._run().candidates)
        if not reasons:
            return self._guarded("curate", run_report.curate)  # says what to run
        return Section(part("macros.html.j2", "bars", rows=run_report.funnel(self.run, reasons)))

    def pairs(self, count: int = 6, reason: str = "kept") -> Section:
        """Pairs with their verdicts. `reason` is `kept`, or the test that rejected them, such as `different`."""
        rows = self._run().examples(reason, count)
        return Section(part("run.html.j2", "duos", rows=rows)) if rows else self.funnel()

    def training(self) -> Section:
        """Losses, the influence of the reference, and the last sheet of samples."""
        return self._guarded("distill", run_report.distill)

    def images(self) -> Section:
        """References and prompts with the image of every method."""
        if self.suite:
            return Section(part("suite.html.j2", "side", samples=suite_report.side(self.run)))
        return self._guarded("images", galleries.images)

    def scores(self) -> Section:
        """The scores of every method, with their intervals, and the charts."""
        if self.suite:
            result = self.run.metrics
            return Section(part("suite.html.j2", "scores", result=result, **suite_report.scores(result)))
        return self._guarded("scores", run_report.scores)

    def _run(self) -> Run:
        """The run. UsageError for an evaluation, which has no pairs."""
        if self.suite:
            raise UsageError("option_unsuited", f"{self.run.folder} is an evaluation. Only a run has pairs and grids.")
        return self.run

    def _guarded(self, macro: str, view: Any) -> Section:
        return Section(run_report.guarded(macro, view, self._run(), macro))


@cache
def style() -> str:
    """The style of the reports, limited to the element of a section by CSS nesting."""
    css = (FOLDER / "templates" / "report.css").read_text("utf8")
    css = re.sub(r"^(\s*)(:root|body)\s*{", r"\1& {", css, flags=re.MULTILINE)
    return f".diptych-report {{ {css} & {{ padding: 1rem; margin: 0; }} }}"
