"""The report of a run: `report/report.html`, one file that needs nothing else, and `report/report.md`.

It only reads what the stages left in the run's folder. A stage that has not run yet is said to be missing; a part that
cannot be read says why. So a report can be written at any time. What is shown is chosen here; `templates/run.html.j2`
and `templates/run.md.j2` say it.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from markupsafe import Markup

from diptych.data import records
from diptych.errors import UserError, describe
from diptych.evaluate.report import relight_report
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.render import Series, count, named, number, part, percent, plural, template, words
from diptych.recipe import tasks
from diptych.utils.io import write_atomic
from diptych.utils.models import FLUX_DEV_NOTE

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe

log = logging.getLogger("diptych.report")
SEAM = "seam"  # the refusal of a grid, and so of all its pairs
SMOOTH = 0.96
ORDER = ("truth", "text_only", "copy", "inpaint", "student", "student_shipped")
BASELINES = ("text_only", "copy", "inpaint")
SHOWN = (("identities", 6), ("kinds", 2))  # references of each split


def write(recipe: Recipe, run_dir: Path) -> Path:
    """Writes `report/report.html` and `report/report.md` and returns the path of the page. UserError if it cannot."""
    run = Run(recipe, run_dir)
    parts = [each for each in PARTS if each[0] != "relight" or recipe.evaluate.relight]
    made = [(anchor, heading, guarded(anchor, view, run, heading)) for anchor, heading, view in parts]
    folder = run.folder / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror or error})") from error
    path = folder / "report.html"
    page = template("page.html.j2").render(
        title=f"{recipe.name} · diptych",
        header=guarded("header", header, run, "header"),
        sections=made,
        license=FLUX_DEV_NOTE if "flux.1-dev" in recipe.teacher.lower() else "",
    )
    write_atomic(path, page.encode())
    write_atomic(folder / "report.md", markdown(run).encode())
    return path


def guarded(macro: str, view: Callable[[Run], dict[str, Any]], run: Run, what: str) -> Markup:
    """A part of the page, or, if what it reads is damaged, a line that says so."""
    try:
        return part("run.html.j2", macro, **view(run))
    except UserError as error:
        said, why = "This part could not be read:", str(error)
    except (KeyError, TypeError, IndexError, AttributeError, TemplateError) as error:
        # Files of another version, or edited by hand: the rest of the page is still worth having.
        log.warning("the report's part '%s' is left out: %s", what, describe(error, kind=True))
        said = "This part could not be shown:"
        why = f"its files are not as expected ({describe(error, kind=True)})."
    return part("macros.html.j2", "missing", what=said, how=why)


def markdown(run: Run) -> str:
    """The numbers of the page, for a terminal or a pull request."""
    parts = [f"# {run.recipe.name}"]
    for name in MARKDOWN:
        if name == "relight" and not run.recipe.evaluate.relight:
            continue
        try:
            said = markdown_part(name, run)
        except (UserError, KeyError, TypeError, IndexError, AttributeError, TemplateError) as error:
            said = f"(A part could not be shown: {describe(error, limit=None, kind=True)})"
        parts += [said] if said else []
    return "\n\n".join(parts) + "\n"


def markdown_part(name: str, run: Run) -> str:
    """One part of the Markdown, empty where there is nothing to say."""
    return str(getattr(template("run.md.j2").module, name)(**MARKDOWN[name](run))).strip()


# ---- the data and the training


def header(run: Run) -> dict[str, Any]:
    """Title, result, and the way of the data in numbers."""
    return {"run": run, "said": headline(run), "steps": flow(run)}


def flow(run: Run) -> list[tuple[str, int | None]]:
    """The way of the data in five numbers."""
    names = {"prompts written": "prompts", "grids painted": "grids", "candidate pairs": "candidates"}
    steps = [(said, run.rows(name)) for said, name in (names | {"pairs kept": "pairs"}).items()]
    trained = run.trained.get("steps") or (run.training[-1]["step"] if run.training else None)
    return [*steps, ("training steps", trained)]


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
    strips = [(r, run.examples(r, 6 if r in ("kept", records.DIFFERENT) else 3)) for r in order if rows]
    return {
        "run": run,
        "total": len(rows),
        "kept": reasons.get("kept", 0),
        "funnel": funnel(run, reasons) if rows else [],
        "strips": [(reason, found) for reason, found in strips if found],
        "similarities": [row["similarity"] for row in rows if row["reason"] in ("kept", records.DIFFERENT)],
        "threshold": limits.same,
        "measured": run.metrics.get("curation"),
    }


def funnel(run: Run, reasons: Counter[str]) -> list[tuple[str, float, str, str]]:
    """Bars of what is left after each step: (name, value, what to write, note)."""
    prompts, grids, pairs = run.rows("prompts") or 0, run.rows("grids") or 0, run.rows("pairs")
    judged = sum(times for reason, times in reasons.items() if reason != SEAM)
    seen = {row["id"].rpartition("-")[0] for row in run.candidates}
    cut = len({row["id"].rpartition("-")[0] for row in run.candidates if row["reason"] != SEAM})
    kept = pairs if pairs is not None else reasons.get("kept", 0)
    called = words()["reasons"]
    lost = [f"{count(n)}: {called.get(r, r)}" for r, n in reasons.most_common() if r not in ("kept", SEAM)]
    failed = {name: f"{count(n)} failed" for name, n in run.failures.items() if n}
    seamless = f"{plural(len(seen) - cut, 'grid')} without a clear seam" if len(seen) > cut else ""
    both = "; ".join(filter(None, (failed.get("curate"), seamless, f"{plural(judged, 'ordered pair')} of panels")))
    # Bars count grids all the way: a pair is its share of one.
    share = kept * cut / judged if judged else 0.0
    return [
        ("prompts", float(prompts), count(prompts), failed.get("write", "")),
        ("grids painted", float(grids), count(grids), failed.get("paint", "")),
        ("grids cut, judged", float(cut), count(cut), both),
        ("pairs kept", share, count(kept), "refused: " + "; ".join(lost) if lost else ""),
    ]


def distill(run: Run) -> dict[str, Any]:
    """Stage 4: losses and the sample sheet."""
    lines = run.training
    sides = ("right",) if run.recipe.distill.conditioning == "tokens" else ("left", "right")
    points = {side: [(x["step"], x[side]) for x in lines if side in x] for side in sides}
    curves = [Series("", side, own, True) for side, own in points.items()] if len(lines) > 60 else []
    curves += [Series(f"{side} panel", side, smooth(own)) for side, own in points.items()]
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
    return {"run": run, "lines": lines, "curves": curves, "levels": levels}


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential moving average, debiased at its start, thinned to what a chart can show."""
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
    """The result in a few sentences, `**bold**`: the run's own student first, the shipped one named as such beside it;
    empty while there is none."""
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
    who = "this run’s student" if student == "student" else "the shipped student (not this run’s)"
    said = (
        f"On {run.metrics.get('identities', mine['n'])} subjects nobody trained on, {who} reaches a CP·PF (subject "
        f"kept × prompt followed) of **{number(mine['cp_pf'])}**, {against}; the 95 % intervals {overlap}. "
        f"{percent(mine['copy_rate'], 1)} of its pictures look like copies of the reference; of true pictures of one "
        f"subject in two scenes, {percent(true, 1)} do."
    )
    for shipped in others:
        said += f" The shipped student, which this run did not train, reaches {number(methods[shipped]['cp_pf'])}."
    return said


def pictures(run: Run) -> dict[str, Any]:
    """References × prompts: each method's picture, with what it got right."""
    methods = [m for m in ORDER if m in run.metrics.get("methods", {}) or m in run.metrics.get("anchors", {})]
    chosen = choose(run) if methods else []
    rows = {m: run.pictures(m, set(chosen)) for m in methods}
    samples: list[tuple[dict[str, Any], list[dict[str, Any]], bool]] = []
    for sample in chosen:
        row = rows[methods[0]].get(sample)
        if row is None:
            continue
        kinds = row["split"] != "identities" and not any(before["split"] != "identities" for before, *_ in samples)
        samples.append((row, side_by_side(run, row, {m: rows[m].get(sample) for m in methods}, counted=True), kinds))
    return {"samples": samples, "how": how(run)}


def side_by_side(
    run: Run, reference: Mapping[str, Any], rows: Mapping[str, Any], counted: bool = False
) -> list[dict[str, Any]]:
    """The cells of one sample: its reference, then every method's row, which is None where it failed."""
    cells = [{"image": reference["reference"], "alt": "The reference", "name": "reference", "line": None}]
    for method, row in rows.items():
        said = {"name": named(method), "image": None, "alt": "", "line": None, "counted": counted}
        if row is not None:
            line = run.scores.get((method, row["id"]))
            said |= {"image": row["image"], "alt": f"{named(method)}: {row['prompt']}", "line": line}
        cells.append(said)
    return cells


def choose(run: Run) -> list[str]:
    """Samples shown: references spread over each split, difficulties in turn, the first seed."""
    lines = [line for (method, _), line in run.scores.items() if method == "truth"]
    chosen = []
    for split, wanted in SHOWN:
        by_identity: dict[int, list[dict[str, Any]]] = {}
        for line in lines:
            if line["split"] == split and line["seed"] == lines[0]["seed"]:
                by_identity.setdefault(line["identity"], []).append(line)
        identities = sorted(by_identity)
        # An odd stride walks through the kinds, which take turns.
        stride = max(1, len(identities) // wanted) | 1 if len(identities) > wanted else 1
        taken = [identities[(i * stride) % len(identities)] for i in range(min(wanted, len(identities)))]
        for place, identity in enumerate(dict.fromkeys(taken)):
            own = by_identity[identity]
            chosen.append(own[place % len(own)]["id"])
    return chosen


def scores(run: Run) -> dict[str, Any]:
    """The table, the charts, difficulty, attributes, comparisons, held-out kinds."""
    found = run.metrics
    anchors, methods = found.get("anchors", {}), found.get("methods", {})
    by = {m: found["levels"][m] for m in methods if found.get("levels", {}).get(m)}
    rates = {m: found["attributes"][m] for m in (*methods, *anchors) if found.get("attributes", {}).get(m)}
    groups = [group for group in words()["groups"] if any(group in rates.get(m, {}) for m in by)]
    names = [*methods, *anchors]
    return {
        "found": found,
        "how": how(run),
        "colours": {m: m for m in names},
        "notes": {m: words()["methods"].get(m, ["", ""])[1] for m in names},
        "levels": {"names": list(next(iter(by.values()), {})), "by": by, "rates": rates, "groups": groups},
    }


def trust(run: Run) -> dict[str, Any]:
    """The judges' own errors, and the scale."""
    return {"found": run.metrics, "how": how(run)}


def how(run: Run) -> str:
    """How scores come about."""
    none = run.recipe.evaluate.suite == "none"
    return "The recipe names no suite (evaluate.suite: none)." if none else "diptych evaluate does it."


# ---- cost and provenance


def cost(run: Run) -> dict[str, Any]:
    """What it took."""
    machine = {**run.start.get("machine", {}), **run.metrics.get("machine", {})}
    known = ("processor", "cores", "threads", "device", "system")
    return {
        "run": run,
        "seconds": run.seconds,
        "machine": [(key, machine[key]) for key in known if key in machine],
        "versions": {**run.start.get("versions", {}), **run.metrics.get("versions", {})},
    }


def provenance(run: Run) -> dict[str, Any]:
    """(what, fingerprint) of every data set and model that the run names."""
    found: list[tuple[str, str]] = []
    for name in ("prompts", "grids", "candidates", "pairs"):
        manifest = run.data(name).manifest or {}
        if manifest.get("fingerprint"):
            found.append((name, manifest["fingerprint"]))
        found += [
            (key[: -len("_sha256")], manifest[key]) for key in ("teacher_sha256", "judge_sha256") if key in manifest
        ]
    for role, about in run.metrics.get("judges", {}).items():
        if role != "curator" and about.get("fingerprint"):
            found.append((role, about["fingerprint"]))
    trained = run.folder / "student" / "training" / "summary.json"
    try:
        made_by = json.loads(trained.read_text("utf8")).get("made_by", {}) if trained.is_file() else {}
    except ValueError:
        made_by = {}
    found += [(f"student’s {key}", made_by[key]) for key in ("base", "pairs") if key in made_by]
    return {"run": run, "prints": list(dict.fromkeys(found))}


PARTS: tuple[tuple[str, str, Callable[[Run], dict[str, Any]]], ...] = (
    ("method", "The method in a minute", lambda run: {"run": run}),
    ("write", "1 · Write", write_view),
    ("paint", "2 · Paint", lambda run: {"run": run, "rows": run.first("grids", 6)}),
    ("curate", "3 · Curate", curate),
    ("distill", "4 · Distill", distill),
    ("pictures", "5 · Side by side", pictures),
    ("scores", "6 · Scores", scores),
    ("relight", "Relighting, against the truth", relight_report.view),
    ("trust", "7 · How far to trust them", trust),
    ("cost", "8 · What it took", cost),
    ("recipe", "9 · What made it", provenance),
)
MARKDOWN: dict[str, Callable[[Run], dict[str, Any]]] = {
    "headline": lambda run: {"said": headline(run)},
    "data": lambda run: {"rows": [*((n, run.rows(n)) for n in ("prompts", "grids", "candidates", "pairs")),
                                  ("training steps", run.trained.get("steps"))]},
    "scores": lambda run: {"found": run.metrics},
    "relight": relight_report.scores,
    "curation": lambda run: {"known": (run.metrics.get("curation") or {}).get("renders")},
    "time": lambda run: {"seconds": run.seconds},
}  # fmt: skip
