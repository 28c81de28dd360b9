"""The report of a run: `report/report.html`, one file that needs nothing else, and `report/report.md`.

It only reads what the stages left in the run's folder. A stage that has not run yet is said to be missing; a part that
cannot be read says why. So a report can be written at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from diptych import __version__
from diptych.data.store import write_atomic
from diptych.errors import UserError
from diptych.evaluate import scoresheet, sections
from diptych.evaluate.gather import Run
from diptych.evaluate.html import count, details, missing, page, paragraph, table, tag, text
from diptych.models import FLUX_DEV_NOTE

if TYPE_CHECKING:
    from diptych.recipe import Recipe

log = logging.getLogger("diptych.report")
PARTS: tuple[tuple[str, str, Callable[[Run], str]], ...] = (
    ("method", "The method in a minute", sections.method),
    ("write", "1 · Write", sections.write),
    ("paint", "2 · Paint", sections.paint),
    ("curate", "3 · Curate", sections.curate),
    ("distill", "4 · Distill", sections.distill),
    ("pictures", "5 · Side by side", scoresheet.pictures),
    ("scores", "6 · Scores", scoresheet.scores),
    ("trust", "7 · How far to trust them", scoresheet.trust),
    ("cost", "8 · What it took", sections.cost),
)


def write(recipe: Recipe, run_dir: Path) -> Path:
    """Writes `report/report.html` and `report/report.md` and returns the path of the page. UserError if it cannot."""
    run = Run(recipe, Path(run_dir))
    made = [(anchor, heading, guarded(part, run, heading)) for anchor, heading, part in PARTS]
    made.append(("recipe", "9 · What made it", guarded(provenance, run, "What made it")))
    folder = Path(run_dir) / "report"
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
    kicker = f"diptych {__version__} · task {recipe.task} · teacher {recipe.teacher} · seed {recipe.seed}"
    return (
        paragraph(text(kicker), class_="kicker")
        + tag("h1", text(recipe.name))
        + (paragraph(said, class_="lead") if said else paragraph("A run on its way.", class_="lead"))
        + sections.flow(run)
    )


def provenance(run: Run) -> str:
    """Fingerprints and the recipe."""
    rows = [
        [text(what), f'<span class="mono">{text(print_[:16])}…</span>'] for what, print_ in sections.provenance(run)
    ]
    known = table(["what", "sha256"], rows) if rows else missing("Nothing has been fingerprinted yet.", "")
    return known + details("The whole recipe", tag("pre", tag("code", text(run.recipe.dump())), tabindex="0"))


def footer(recipe: Recipe) -> str:
    """How to read this page elsewhere, and the licence of a base that has one."""
    licence = f" {FLUX_DEV_NOTE}" if "flux.1-dev" in recipe.teacher.lower() else ""
    return paragraph(f"Made by diptych {__version__}. This page is one file and loads nothing.{text(licence)}")


def markdown(run: Run) -> str:
    """The numbers of the page, for a terminal or a pull request."""
    recipe, found = run.recipe, run.metrics
    lines = [f"# {recipe.name}", ""]
    said = scoresheet.headline(run)
    if said:
        lines += [said.replace("<strong>", "**").replace("</strong>", "**"), ""]
    lines += ["| | |", "|---|---|"]
    for name in ("prompts", "grids", "candidates", "pairs"):
        rows = run.rows(name)
        lines.append(f"| {name} | {'not there yet' if rows is None else count(rows)} |")
    steps = run.trained.get("steps")
    lines += [f"| training steps | {'not there yet' if steps is None else count(steps)} |", ""]
    if found.get("methods"):
        lines += ["## Scores", "", "| method | CP | PF | CP·PF | 95 % | copy rate | s/picture | n |"]
        lines += ["|---|---:|---:|---:|---|---:|---:|---:|"]
        for method, s in {**found["methods"], **found.get("anchors", {})}.items():
            low, high = s["ci95"]["cp_pf"]
            speed = s.get("seconds_per_image")
            lines.append(
                f"| {scoresheet.name(method)} | {s['cp']:.3f} | {s['pf']:.3f} | {s['cp_pf']:.3f} "
                f"| {low:.3f}–{high:.3f} | {s['copy_rate']:.3f} | {speed_text(speed)} | {s['n']} |"
            )
        lines.append("")
    curated = (found.get("curation") or {}).get("renders")
    if curated:
        precision = "–" if curated["precision"] is None else f"{curated['precision']:.3f}"
        lines += ["## Curation", "", f"On {curated['pairs']} known pairs at threshold {curated['threshold']:g}: "]
        lines[-1] += f"precision {precision}, recall {curated['recall']:.3f}."
        lines.append("")
    if run.seconds:
        lines += ["## Time", "", "| stage | |", "|---|---:|"]
        lines += [f"| {stage} | {sections.duration(seconds)} |" for stage, seconds in run.seconds.items()]
        lines.append("")
    for method, reason in found.get("skipped", {}).items():
        lines.append(f"{scoresheet.name(method)} was left out: {reason}")
    return "\n".join(lines).rstrip() + "\n"


def speed_text(seconds: float | None) -> str:
    """Seconds a picture, two digits."""
    return "–" if seconds is None else f"{seconds:.2g}"
