"""The report of a run: `report/report.html`, one self-contained file, and `report/report.md`.

It reads the files of the stages in the run's folder and can be written at any time: a section whose stage has not run
says so, and a section that cannot be read gives the reason. This module selects the content; `templates/run.html.j2`
and `templates/run.md.j2` have the text.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from markupsafe import Markup

from diptych.data import verdicts
from diptych.errors import UserError, describe
from diptych.evaluate.report import galleries, relight_report
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.render import Series, count, named, number, part, percent, plural, template, words
from diptych.recipe import tasks
from diptych.train.metrics import reference_warning
from diptych.utils import licenses
from diptych.utils.io import write_atomic
from diptych.utils.opening import folder_of

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe

log = logging.getLogger("diptych.report")
SEAM = "seam"  # the reason that rejects a grid, and so all its pairs
SMOOTH = 0.96
BASELINES = ("text_only", "copy", "inpaint")


def write(recipe: Recipe, run_dir: Path) -> Path:
    """Writes `report/report.html` and `report/report.md`; returns the path of the page. UserError if it cannot."""
    run = Run(recipe, run_dir)
    parts = [each for each in PARTS if each[0] != "relight" or recipe.evaluate.relight]
    made = [(anchor, heading, guarded(anchor, view, run, heading)) for anchor, heading, view in parts]
    path = run.folder / "report" / "report.html"
    page = template("page.html.j2").render(
        title=f"{recipe.name} · diptych",
        header=guarded("header", header, run, "header"),
        sections=made,
        license=row.note if (row := licenses.find(recipe.teacher, folder_of(recipe.teacher))) is not None else "",
    )
    write_atomic(path, page.encode())
    write_atomic(path.with_suffix(".md"), markdown(run).encode())
    return path


def guarded(macro: str, view: Callable[[Run], dict[str, Any]], run: Run, heading: str) -> Markup:
    """A section of the page; if the files that it reads are damaged, a line with the reason."""
    try:
        return part("run.html.j2", macro, **view(run))
    except UserError as error:
        problem, reason = "Cannot read this section:", str(error)
    except (KeyError, TypeError, IndexError, AttributeError, TemplateError) as error:
        # Files of another version, or edited by hand. The other sections are still useful.
        log.warning("the report leaves out the section '%s': %s", heading, describe(error, kind=True))
        problem = "Cannot show this section:"
        reason = f"its files are not of the expected form ({describe(error, kind=True)})."
    return part("macros.html.j2", "missing", what=problem, how=reason)


def markdown(run: Run) -> str:
    """The numbers of the page in Markdown."""
    parts = [f"# {run.recipe.name}"]
    for name in MARKDOWN:
        if name == "relight" and not run.recipe.evaluate.relight:
            continue
        try:
            text = part("run.md.j2", name, **MARKDOWN[name](run)).strip()
        except (UserError, KeyError, TypeError, IndexError, AttributeError, TemplateError) as error:
            text = f"(Cannot show the section {name}: {describe(error, limit=None, kind=True)})"
        parts += [text] if text else []
    return "\n\n".join(parts) + "\n"


# ---- the data and the training


def header(run: Run) -> dict[str, Any]:
    """Title, result, and the size of each stage's output."""
    names = {"prompts written": "prompts", "grids painted": "grids", "candidate pairs": "candidates"}
    steps = [(label, run.rows(name)) for label, name in (names | {"accepted pairs": "pairs"}).items()]
    trained = run.trained.get("steps") or (run.training[-1]["step"] if run.training else None)
    return {"run": run, "headline": headline(run), "steps": [*steps, ("training steps", trained)]}


def write_view(run: Run) -> dict[str, Any]:
    """Stage 1."""
    rows = run.first("prompts", 4)
    subjects = Counter(row["subject"] for row in run.data("prompts").columns("subject")) if rows else Counter()
    return {"rows": rows, "subjects": subjects}


def curate(run: Run) -> dict[str, Any]:
    """Stage 3: funnel, verdicts, the judge's numbers."""
    rows = run.candidates
    reasons = Counter(row["reason"] for row in rows)
    limits = tasks.load(run.recipe.task).thresholds(run.recipe.curate.thresholds)
    order = ["kept", *(reason for reason, _ in reasons.most_common() if reason != "kept")]
    strips = [(r, run.examples(r, 6 if r in ("kept", verdicts.DIFFERENT) else 3)) for r in order if rows]
    return {
        "run": run,
        "total": len(rows),
        "accepted": reasons.get("kept", 0),
        "funnel": funnel(run, reasons) if rows else [],
        "strips": [(reason, examples) for reason, examples in strips if examples],
        "similarities": [row["similarity"] for row in rows if row["reason"] in ("kept", verdicts.DIFFERENT)],
        "threshold": limits.same,
        "measured": run.metrics.get("curation"),
    }


def funnel(run: Run, reasons: Counter[str]) -> list[tuple[str, float, str, str]]:
    """Bars of the rows left after each step: (name, value, number as text, note)."""
    prompts, grids, pairs = run.rows("prompts") or 0, run.rows("grids") or 0, run.rows("pairs")
    judged = sum(n for reason, n in reasons.items() if reason != SEAM)
    all_grids = {row["id"].rpartition("-")[0] for row in run.candidates}
    cut = len({row["id"].rpartition("-")[0] for row in run.candidates if row["reason"] != SEAM})
    accepted = pairs if pairs is not None else reasons.get("kept", 0)
    texts = words()["reasons"]
    rejected = [f"{count(n)}: {texts.get(r, r)}" for r, n in reasons.most_common() if r not in ("kept", SEAM)]
    failed = {name: f"{count(n)} failed" for name, n in run.failures.items() if n}
    seamless = f"{plural(len(all_grids) - cut, 'grid')} without a clear seam" if len(all_grids) > cut else ""
    notes = "; ".join(filter(None, (failed.get("curate"), seamless, f"{plural(judged, 'ordered pair')} of panels")))
    # All bars count grids; a pair counts as its share of a grid.
    share = accepted * cut / judged if judged else 0.0
    return [
        ("prompts", float(prompts), count(prompts), failed.get("write", "")),
        ("grids painted", float(grids), count(grids), failed.get("paint", "")),
        ("grids cut and judged", float(cut), count(cut), notes),
        ("accepted pairs", share, count(accepted), "rejected: " + "; ".join(rejected) if rejected else ""),
    ]


def distill(run: Run) -> dict[str, Any]:
    """Stage 4: losses and the sample sheet."""
    lines = run.training
    sides = ("right",) if run.recipe.distill.conditioning == "tokens" else ("left", "right")
    points = {side: [(x["step"], x[side]) for x in lines if side in x] for side in sides}
    curves = [Series("", side, each, True) for side, each in points.items()] if len(lines) > 60 else []
    curves += [Series(f"{side} panel", side, smooth(each)) for side, each in points.items()]
    validated = [(x["step"], x["validation"]) for x in lines if x.get("validation")]
    levels = [
        (
            side,
            [
                Series(f"σ = {level}", str(i % 5 + 1), [(s, v[side][level]) for s, v in validated if level in v[side]])
                for i, level in enumerate(validated[-1][1].get(side, {}))
            ],
        )
        for side in (points if validated else ())
    ]
    influence = [(step, 100 * v["reference_influence"]) for step, v in validated if "reference_influence" in v]
    warning = reference_warning(validated[-1][1]) if validated else None
    return {
        "run": run,
        "lines": lines,
        "curves": curves,
        "levels": levels,
        "influence": [Series("", "right", influence)] if influence else [],
        "warning": warning,
        "learned": galleries.learned(run.sheets),
    }


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential moving average, debiased at its start and thinned for a chart."""
    total = weight = 0.0
    averaged = []
    keep = max(0.0, min(SMOOTH, 1 - 40 / max(50, len(points))))
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        averaged.append((x, total / weight))
    step = max(1, len(averaged) // 400)
    return averaged[::step][:-1] + averaged[-1:]


# ---- images and scores


def headline(run: Run) -> str:
    """The result in a few sentences with `**bold**` words: the run's student, then the packaged one. Empty without a
    student or a baseline."""
    methods = run.metrics.get("methods", {})
    students = [m for m in ("student", "student_shipped") if m in methods]
    rivals = [m for m in BASELINES if m in methods]
    if not students or not rivals:
        return ""
    student, *others = students
    rival = max(rivals, key=lambda m: methods[m]["cp_pf"])
    mine, theirs = methods[student], methods[rival]
    best = f"the best zero-shot baseline, {named(rival)}, {number(theirs['cp_pf'])}"
    if mine["cp_pf"] > theirs["cp_pf"] > 0:
        against = f"{mine['cp_pf'] / theirs['cp_pf']:.1f} times {best}"
    else:
        against = f"{'not above' if mine['cp_pf'] <= theirs['cp_pf'] else 'against'} {best}"
    own, other = mine["ci95"]["cp_pf"], theirs["ci95"]["cp_pf"]
    overlap = "overlap" if own[0] <= other[1] and other[0] <= own[1] else "do not overlap"
    true = run.metrics.get("copy_rate_of_renders", {}).get("copy_rate")
    who = "this run’s student" if student == "student" else "the packaged student (not this run’s)"
    text = (
        f"On {run.metrics.get('identities', mine['n'])} held-out subjects, {who} reaches a CP·PF (concept preservation "
        f"× prompt following) of **{number(mine['cp_pf'])}**, {against}; the 95 % intervals {overlap}. "
        f"{percent(mine['copy_rate'], 1)} of its images look like copies of the reference. Of true images of one "
        f"subject in two scenes, {percent(true, 1)} do."
    )
    for shipped in others:
        text += f" The packaged student, which this run did not train, reaches {number(methods[shipped]['cp_pf'])}."
    return text


def measured(result: dict[str, Any]) -> dict[str, str]:
    """The columns in which a method or an anchor has a number."""
    everyone = [*result.get("methods", {}).values(), *result.get("anchors", {}).values()]
    return {key: label for key, label in words()["scores"].items() if any(key in scores for scores in everyone)}


def scores(run: Run) -> dict[str, Any]:
    """The table, the charts, difficulty, attributes, comparisons, held-out kinds."""
    result = run.metrics
    anchors, methods = result.get("anchors", {}), result.get("methods", {})
    by = {m: result["levels"][m] for m in methods if result.get("levels", {}).get(m)}
    rates = {m: result["attributes"][m] for m in (*methods, *anchors) if result.get("attributes", {}).get(m)}
    groups = [group for group in words()["groups"] if any(group in rates.get(m, {}) for m in by)]
    names = [*methods, *anchors]
    return {
        "result": result,
        "shown": measured(result),
        "how": galleries.how(run),
        "colors": {m: m for m in names},
        "notes": {m: words()["methods"].get(m, ["", ""])[1] for m in names},
        "levels": {"names": list(next(iter(by.values()), {})), "by": by, "rates": rates, "groups": groups},
    }


def trust(run: Run) -> dict[str, Any]:
    """The judges' errors, and the scale of the scores."""
    return {"result": run.metrics, "how": galleries.how(run)}


# ---- cost and provenance


def cost(run: Run) -> dict[str, Any]:
    """Time of each stage, machine and versions."""
    last = run.starts[-1] if run.starts else {}
    machine = {**last.get("machine", {}), **run.metrics.get("machine", {})}
    known = ("processor", "cores", "threads", "device", "system")
    return {
        "starts": max(1, len(run.starts)),
        "seconds": run.seconds,
        "machine": [(key, machine[key]) for key in known if key in machine],
        "versions": {**last.get("versions", {}), **run.metrics.get("versions", {})},
    }


def provenance(run: Run) -> dict[str, Any]:
    """(name, fingerprint) of every dataset and model of the run."""
    hashes: list[tuple[str, str]] = []
    for name in ("prompts", "grids", "candidates", "pairs"):
        manifest = run.data(name).manifest or {}
        named_hashes = {name: "fingerprint", "teacher": "teacher_sha256", "judge": "judge_sha256"}
        hashes += [(label, manifest[key]) for label, key in named_hashes.items() if manifest.get(key)]
    for role, about in run.metrics.get("judges", {}).items():
        if role != "curator" and about.get("fingerprint"):
            hashes.append((role, about["fingerprint"]))
    made_by = run.json("student/training/summary.json").get("made_by", {})
    hashes += [(f"student’s {key}", made_by[key]) for key in ("base", "pairs") if key in made_by]
    return {"run": run, "hashes": list(dict.fromkeys(hashes))}


PARTS: tuple[tuple[str, str, Callable[[Run], dict[str, Any]]], ...] = (
    ("gallery", "Held-out references and the student’s images", galleries.gallery),
    ("method", "The method", lambda run: {"run": run}),
    ("write", "1 · Write", write_view),
    ("paint", "2 · Paint", lambda run: {"run": run, "rows": run.first("grids", 6)}),
    ("curate", "3 · Curate", curate),
    ("distill", "4 · Distill", distill),
    ("images", "5 · Side by side", galleries.images),
    ("scores", "6 · Scores", scores),
    ("relight", "Relighting, against the truth", relight_report.view),
    ("trust", "7 · Errors of the judges", trust),
    ("cost", "8 · Time and machine", cost),
    ("recipe", "9 · Recipe and fingerprints", provenance),
)
MARKDOWN: dict[str, Callable[[Run], dict[str, Any]]] = {
    "headline": lambda run: {"text": headline(run)},
    "data": lambda run: {"rows": [*((n, run.rows(n)) for n in ("prompts", "grids", "candidates", "pairs")),
                                  ("training steps", run.trained.get("steps"))]},
    "scores": lambda run: {"result": run.metrics},
    "relight": relight_report.scores,
    "curation": lambda run: {"known": (run.metrics.get("curation") or {}).get("renders")},
    "time": lambda run: {"seconds": run.seconds},
}  # fmt: skip
