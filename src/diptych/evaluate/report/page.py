"""The report of `diptych evaluate --suite`: `report/report.html`, one file that loads nothing, and `report/report.md`.

Reads what was drawn and scored; like the report of a run it is made of `html` and `charts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.evaluate.config import Evaluation
from diptych.evaluate.report import page_tables, scoresheet
from diptych.evaluate.report import page_tables as page_pictures
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.html import missing, number, page, paragraph, percent, plural, signed, tag, text
from diptych.evaluate.report.page_tables import COLUMNS, everyone, measured, models, p_text, published
from diptych.evaluate.scoring import metrics
from diptych.utils.io import write_atomic
from diptych.utils.machine import VERSION
from diptych.utils.models import BUILT_IN


def write(out: Path) -> Path:
    """Writes the report of a scored evaluation and returns the page's path. UserError if it is not scored."""
    run = Run(Evaluation().recipe(), out)
    found = run.metrics
    if not found:
        raise UserError(f"{out} is not scored yet; first: diptych evaluate --out {out} --only score")
    parts = [
        ("scores", "Scores", page_tables.scores(found)),
        ("compared", "Compared on the same samples", page_tables.compared(found)),
        ("published", "Beside published numbers", page_tables.beside(found)),
        ("groups", "By category and difficulty", page_tables.groups(found)),
        ("ends", "Best and worst", page_pictures.ends(run)),
        ("side", "Side by side", page_pictures.side(run)),
        ("cost", "What a picture costs", page_tables.costs(found)),
        ("judge", "Who judged", page_tables.judged(found)),
    ]
    shown = [(anchor, heading, inner) for anchor, heading, inner in parts if inner]
    foot = paragraph(f"Made by diptych {VERSION}. This page is one file and loads nothing.")
    folder = out / "report"
    path = folder / "report.html"
    write_atomic(path, page(f"{found['suite']} · diptych", header(found), shown, foot).encode())
    write_atomic(folder / "report.md", markdown(found).encode())
    return path


def header(found: dict[str, Any]) -> str:
    """Title and result."""
    settings = found["settings"]
    kicker = f"diptych {VERSION} · suite {found['suite']}, version {found['version']} · {found['machine']['device']}"
    asked = (
        f"{plural(found['identities'], 'reference')} × {found['prompts']:g} prompts × "
        f"{plural(len(found['seeds']), 'seed')}"
    )
    title = " · ".join(settings["models"]) or "baselines"
    forced = (
        missing("A judge scored what it curated (--force):", "these numbers flatter that model.")
        if (found["judges"]["forced"])
        else ""
    )
    return (
        paragraph(text(kicker), class_="kicker")
        + tag("h1", text(title))
        + paragraph(headline(found), class_="lead")
        + paragraph(asked, class_="note")
        + forced
    )


def headline(found: dict[str, Any]) -> str:
    """The result in two sentences, HTML."""
    named = found["settings"]["models"]
    own = [name for name in models(found) if named.get(name) not in BUILT_IN]  # the shipped one speaks for nobody else
    best = max(own or models(found), key=lambda name: found["methods"][name]["cp_pf"])
    mine = found["methods"][best]
    said = (
        f"{text(scoresheet.name(best))} reaches a CP·PF (subject kept × prompt followed) of "
        f"<strong>{number(mine['cp_pf'])}</strong>, and {percent(mine['copy_rate'], 1)} of its pictures copy their "
        "reference."
    )
    rivals = [name for name in found["methods"] if name not in found["settings"]["models"]]
    if not rivals or best in rivals:
        return said
    rival = max(rivals, key=lambda name: found["methods"][name]["cp_pf"])
    c = found["comparisons"][best][rival]
    gap = f"{signed(c['difference'])} ({signed(c['ci95'][0])} to {signed(c['ci95'][1])}, p {p_text(c)})"
    return f"{said} Against the best baseline, {text(scoresheet.name(rival))}: {gap}."


def markdown(found: dict[str, Any]) -> str:
    """The numbers of the page, for a terminal or a pull request."""
    said = headline(found).replace("<strong>", "**").replace("</strong>", "**").replace("&lt;", "<")
    shown = measured(found)
    parts = [f"# {found['suite']}, version {found['version']}", said, "## Scores"]
    rows = []
    for name, s in everyone(found).items():
        low, high = s["ci95"]["cp_pf"]
        cells = [scoresheet.name(name), *(_plain(s.get(key)) for key in shown), f"{low:.3f}–{high:.3f}"]
        rows.append([*cells, copies(s), _plain(s.get("seconds_per_image"), 2), str(s["n"])])
    parts.append(_md(["method", *shown.values(), "95 % of CP·PF", "copy rate", "s/picture", "n"], rows))
    pairs = [
        [
            f"{scoresheet.name(a)} − {scoresheet.name(b)}",
            f"{c['difference']:+.3f}",
            _p(c),
            str(c["n"]),
        ]
        for a, by in found["comparisons"].items()
        for b, c in by.items()
    ]
    if pairs:
        parts += ["## Compared on the same samples", _md(["CP·PF", "difference", "p", "n"], pairs)]
    if known := published().get(found["suite"]):
        columns = known["columns"]
        theirs = [[name, *(_plain(row.get(key)) for key in columns)] for name, row in known["rows"].items()]
        parts += ["## Published, not comparable across harnesses", known["source"]]
        parts.append(_md(["method", *(COLUMNS[key] for key in columns)], theirs))
    return "\n\n".join(parts) + "\n"


def _p(compared: dict[str, Any]) -> str:
    return metrics.p_said(compared, 4).removeprefix("= ")


def copies(scores: dict[str, Any]) -> str:
    """The copy rate with its interval, for Markdown."""
    low, high = scores["ci95"]["copy_rate"]
    return f"{scores['copy_rate']:.3f} ({low:.3f}–{high:.3f})"


def _plain(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _md(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
