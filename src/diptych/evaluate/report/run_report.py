"""The report of a run: `report/report.html`, one file that needs nothing else, and `report/report.md`.

It only reads what the stages left in the run's folder. A stage that has not run yet is said to be missing; a part that
cannot be read says why. So a report can be written at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.errors import UserError
from diptych.evaluate.report import relight_sheet, scoresheet, stages
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.html import count, details, missing, page, paragraph, table, tag, text
from diptych.utils.io import write_atomic
from diptych.utils.machine import VERSION
from diptych.utils.models import FLUX_DEV_NOTE

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe

log = logging.getLogger("diptych.report")
PARTS: tuple[tuple[str, str, Callable[[Run], str]], ...] = (
    ("method", "The method in a minute", stages.method),
    ("write", "1 · Write", stages.write),
    ("paint", "2 · Paint", stages.paint),
    ("curate", "3 · Curate", stages.curate),
    ("distill", "4 · Distill", stages.distill),
    ("pictures", "5 · Side by side", scoresheet.pictures),
    ("scores", "6 · Scores", scoresheet.scores),
    ("trust", "7 · How far to trust them", scoresheet.trust),
    ("cost", "8 · What it took", stages.cost),
)


def write(recipe: Recipe, run_dir: Path) -> Path:
    """Writes `report/report.html` and `report/report.md` and returns the path of the page. UserError if it cannot."""
    run = Run(recipe, run_dir)
    made = [(anchor, heading, guarded(part, run, heading)) for anchor, heading, part in PARTS]
    if recipe.evaluate.relight:
        place = [anchor for anchor, _, _ in made].index("trust")
        part = guarded(relight_sheet.table_and_pictures, run, "Relighting")
        made.insert(place, ("relight", "Relighting, against the truth", part))
    made.append(("recipe", "9 · What made it", guarded(provenance, run, "What made it")))
    folder = run.folder / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror or error})") from error
    path = folder / "report.html"
    whole = page(f"{recipe.name} · diptych", guarded(header, run, "header"), made, footer(recipe))
    write_atomic(path, whole.encode())
    write_atomic(folder / "report.md", markdown(run).encode())
    return path


def guarded(part: Callable[[Run], str], run: Run, what: str) -> str:
    """A part of the page, or, if what it reads is damaged, a line that says so."""
    try:
        return part(run)
    except UserError as error:
        return missing("This part could not be read:", str(error))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        # Files of another version, or edited by hand: the rest of the page is still worth having.
        log.warning("the report's part '%s' is left out: %s: %s", what, type(error).__name__, error)
        return missing(
            "This part could not be shown:", f"its files are not as expected ({type(error).__name__}: {error})."
        )


def header(run: Run) -> str:
    """Title, result, and the way of the data in numbers."""
    recipe = run.recipe
    said = scoresheet.headline(run)
    kicker = f"diptych {VERSION} · task {recipe.task} · teacher {recipe.teacher} · seed {recipe.seed}"
    return (
        paragraph(text(kicker), class_="kicker")
        + tag("h1", text(recipe.name))
        + (paragraph(said, class_="lead") if said else paragraph("A run on its way.", class_="lead"))
        + stages.flow(run)
    )


def provenance(run: Run) -> str:
    """Fingerprints and the recipe."""
    rows = [[text(what), f'<span class="mono">{text(print_[:16])}…</span>'] for what, print_ in stages.provenance(run)]
    known = table(["what", "sha256"], rows) if rows else missing("Nothing has been fingerprinted yet.", "")
    return known + details("The whole recipe", tag("pre", tag("code", text(run.recipe.dump())), tabindex="0"))


def footer(recipe: Recipe) -> str:
    """How to read this page elsewhere, and the licence of a base that has one."""
    licence = f" {FLUX_DEV_NOTE}" if "flux.1-dev" in recipe.teacher.lower() else ""
    return paragraph(f"Made by diptych {VERSION}. This page is one file and loads nothing.{text(licence)}")


def markdown(run: Run) -> str:
    """The numbers of the page, for a terminal or a pull request."""
    parts = [f"# {run.recipe.name}"]
    for part in (headline_lines, data_lines, score_lines, relight_sheet.lines, curation_lines, time_lines):
        try:
            lines = part(run)
        except (UserError, KeyError, TypeError, IndexError, AttributeError) as error:
            lines = [f"(A part could not be shown: {type(error).__name__}: {error})"]
        if lines:
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def headline_lines(run: Run) -> list[str]:
    """The result in a sentence."""
    said = scoresheet.headline(run)
    return [said.replace("<strong>", "**").replace("</strong>", "**")] if said else []


def data_lines(run: Run) -> list[str]:
    """Rows of each data set."""
    rows: list[tuple[str, int | None]] = [
        (name, run.rows(name)) for name in ("prompts", "grids", "candidates", "pairs")
    ]
    rows.append(("training steps", run.trained.get("steps")))
    lines = [f"| {name} | {'not there yet' if n is None else count(n)} |" for name, n in rows]
    return ["| | |", "|---|---|", *lines]


def score_lines(run: Run) -> list[str]:
    """The scores, anchors included, and what was left out."""
    found = run.metrics
    if not found.get("methods"):
        return []
    lines = ["## Scores", "", "| method | CP | PF | CP·PF | 95 % | copy rate | s/picture | n |"]
    lines.append("|---|---:|---:|---:|---|---:|---:|---:|")
    for method, s in {**found["methods"], **found.get("anchors", {})}.items():
        low, high = s["ci95"]["cp_pf"]
        scores = " | ".join(f"{s[key]:.3f}" for key in ("cp", "pf", "cp_pf"))
        rest = f"{low:.3f}–{high:.3f} | {s['copy_rate']:.3f} | {speed_text(s.get('seconds_per_image'))} | {s['n']}"
        lines.append(f"| {scoresheet.name(method)} | {scores} | {rest} |")
    skipped = [f"{scoresheet.name(m)} was left out: {reason}" for m, reason in found.get("skipped", {}).items()]
    return [*lines, *([""] if skipped else []), *skipped]


def curation_lines(run: Run) -> list[str]:
    """Precision and recall where the truth is known."""
    known = (run.metrics.get("curation") or {}).get("renders")
    if not known:
        return []
    precision = "–" if known["precision"] is None else f"{known['precision']:.3f}"
    said = f"On {known['pairs']} known pairs at threshold {known['threshold']:g}: precision {precision}, "
    return ["## Curation", "", f"{said}recall {known['recall']:.3f}."]


def time_lines(run: Run) -> list[str]:
    """Time of each stage."""
    if not run.seconds:
        return []
    lines = [f"| {stage} | {stages.duration(seconds)} |" for stage, seconds in run.seconds.items()]
    return ["## Time", "", "| stage | |", "|---|---:|", *lines]


def speed_text(seconds: float | None) -> str:
    """Seconds a picture, two digits."""
    return "–" if seconds is None else f"{seconds:.2g}"
