"""The report of `diptych evaluate --suite`: `report/report.html`, one self-contained file, and `report/report.md`.

It reads the images and the scores. This module selects the content; `templates/suite.html.j2` and
`templates/suite.md.j2` have the text, with the tables and charts of a run's report.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.evaluate.evaluation import Evaluation
from diptych.evaluate.report.galleries import side_by_side
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.render import count, digits, named, number, part, percent, signed, template, words
from diptych.evaluate.report.run_report import measured
from diptych.evaluate.results import has_scores
from diptych.evaluate.scoring.metrics import format_p
from diptych.utils.io import write_atomic
from diptych.utils.models import BUILT_IN

MODEL_COLORS = 6  # baselines and anchors have colors by name
BEST = 6  # images shown of the best, and of the worst
SIDE_BY_SIDE = 5


def write(out: Path) -> Path:
    """Writes the report of a scored evaluation; returns the page's path. UserError if it is not scored."""
    run = Run(Evaluation().recipe(), out)
    result = run.metrics
    if not result:
        raise UserError("run_incomplete", f"{out} has no scores yet. Run `diptych evaluate --out {out} --only score`.")
    known = words()["published"].get(result["suite"])
    shared: dict[str, Any] = {"result": result}
    parts: list[tuple[str, str, dict[str, Any]]] = [
        ("scores", "Scores", shared | scores(result)),
        ("compared", "Compared on the same samples", shared),
        ("published", "Published numbers", shared | {"known": known}),
        ("groups", "By category and difficulty", shared | {"groups": groups(result)}),
        ("ends", "Best and worst", {"models": ends(run)}),
        ("side", "Side by side", {"samples": side(run)}),
        ("cost", "Cost of an image", shared | costs(result)),
        ("judge", "Judges", judged(result)),
    ]
    sections = [(anchor, heading, part("suite.html.j2", anchor, **given)) for anchor, heading, given in parts]
    page = template("page.html.j2").render(
        title=f"{result['suite']} · diptych",
        header=part("suite.html.j2", "header", result=result, headline=headline(result)),
        sections=[each for each in sections if each[2].strip()],
        license="",
    )
    path = out / "report" / "report.html"
    write_atomic(path, page.encode())
    values = {"result": result, "headline": headline(result), "shown": measured(result), "known": known}
    text = template("suite.md.j2").render(**values)
    write_atomic(path.with_suffix(".md"), (text.strip() + "\n").encode())
    return path


def everyone(result: dict[str, Any]) -> dict[str, Any]:
    """Methods, then anchors."""
    return {**result["methods"], **result["anchors"]}


def models(result: dict[str, Any]) -> list[str]:
    """The names of the models, or those of the baselines if there are no models."""
    return [name for name in result["methods"] if name in result["settings"]["models"]] or list(result["methods"])


def headline(result: dict[str, Any]) -> str:
    """The result in two sentences with `**bold**` words."""
    ours, scores = result["settings"]["models"], result["methods"]
    own = [name for name in models(result) if ours.get(name) not in BUILT_IN]  # the packaged student comes last
    best = max(own or models(result), key=lambda name: scores[name]["cp_pf"])
    mine = scores[best]
    text = (
        f"{named(best)} reaches a CP·PF (concept preservation × prompt following) of **{number(mine['cp_pf'])}**, and "
        f"{percent(mine['copy_rate'], 1)} of its images copy their reference."
    )
    rivals = [name for name in scores if name not in ours]
    if not rivals or best in rivals:
        return text
    rival = max(rivals, key=lambda name: scores[name]["cp_pf"])
    c = result["comparisons"][best][rival]
    gap = f"{signed(c['difference'])} ({signed(c['ci95'][0])} to {signed(c['ci95'][1])}, p {format_p(c)})"
    return f"{text} Difference from the best baseline, {named(rival)}: {gap}."


def scores(result: dict[str, Any]) -> dict[str, Any]:
    """The table, the charts, held-out kinds, and images without a score."""
    paths = result["settings"]["models"]
    colors = {
        name: f"m{list(paths).index(name) % MODEL_COLORS + 1}"
        if name in paths
        else (name if name in words()["methods"] else "total")
        for name in everyone(result)
    }
    notes = {name: words()["methods"].get(name, ["", ""])[1] for name in everyone(result)}
    notes |= {name: "" if path == name else path for name, path in paths.items()}
    unjudged = ", ".join(f"{name} {n}" for name, n in result["unjudged"].items() if n)
    return {"shown": measured(result), "colors": colors, "notes": notes, "unjudged": unjudged}


def groups(result: dict[str, Any]) -> list[tuple[str, list[str], dict[str, Any]]]:
    """Breakdowns of the scores: title, values, and each method's scores by value."""
    made = []
    for key, title in (("categories", "By category"), ("levels", "By difficulty")):
        by = {name: result[key].get(name, {}) for name in everyone(result)}
        values = list(dict.fromkeys(value for each in by.values() for value in each))
        if len(values) > 1:
            made.append((title, values, by))
    return made


def ends(run: Run) -> list[tuple[str, str, list[tuple[dict[str, Any], dict[str, Any]]]]]:
    """Each model's best and worst images by CP × PF; ties are in order of names."""
    made = []
    for name in models(run.metrics):
        lines = [x for (method, _), x in run.scores.items() if method == name and has_scores(x)]
        lines.sort(key=lambda x: (-max(0.0, x["cp"]) * max(0.0, x["pf"]), -x["cp"] - x["pf"], x["id"]))
        few = min(BEST, max(1, len(lines) // 2))
        rows = run.images(name, {x["id"] for x in [*lines[:few], *lines[-few:]]})
        for title, chosen in (("the best", lines[:few]), ("the worst", lines[-few:][::-1])):
            made.append((name, title, [(rows[x["id"]], x) for x in chosen if x["id"] in rows]))
    return made


def side(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """Some samples with the image of every method: the prompt and the cells."""
    names = [name for name in everyone(run.metrics) if name != "copy"]
    lines = [x for (m, _), x in run.scores.items() if m == names[0] and x["seed"] == run.metrics["seeds"][0]]
    # An odd stride walks through the prompts, which take turns.
    stride = max(1, len(lines) // SIDE_BY_SIDE) | 1
    chosen = list(dict.fromkeys(lines[(i * stride) % len(lines)]["id"] for i in range(min(SIDE_BY_SIDE, len(lines)))))
    rows = {name: run.images(name, set(chosen)) for name in names}
    first = [(id, rows[names[0]].get(id)) for id in chosen]
    return [
        (row["prompt"], side_by_side(run, row, {name: by_id.get(id) for name, by_id in rows.items()}))
        for id, row in first
        if row is not None
    ]


def costs(result: dict[str, Any]) -> dict[str, Any]:
    """Time, memory and price of an image: the known columns, and a row of cells for each method."""
    methods = {name: s for name, s in result["methods"].items() if name != "copy"}
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "s / image": ("seconds_per_image", digits),
        "peak memory": ("peak_memory_bytes", lambda size: f"{size / 2**30:.2f} GiB"),
        "generation": ("drawing_cost", digits),
        "judge tokens": ("judge_tokens_per_image", lambda mean: f"{count(mean[0])} in, {count(mean[1])} out"),
        "judging": ("judging_cost", digits),
    }
    known = {head: each for head, each in columns.items() if any(s.get(each[0]) is not None for s in methods.values())}
    rows = [
        (name, ["–" if s.get(key) is None else text(s[key]) for key, text in known.values()])
        for name, s in methods.items()
    ]
    return {"head": list(known), "rows": rows}


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """The judge and its pinned models, the curators, and settings. A value is a text and perhaps a hash."""
    judges, judge = result["judges"], result["judges"]["judge"]
    pairs: list[tuple[str, str, str]] = [("judge", judge["kind"], "")]
    pairs += [(role, *pinned(judge[role])) for role in ("scorer", "reader", "text") if role in judge]
    if "model" in judge:
        rubric = judge["rubric"]
        pairs += [("model", judge["model"], ""), ("answers to each question", judge["repeats"], "")]
        pairs += [("rubric", f"version {rubric['version']},", rubric["sha256"][:12])]
    pairs += [(words()["scores"][key], *pinned(about)) for key, about in judges.items() if key in words()["scores"]]
    for name, curated in judges["curated_by"].items():
        pairs.append((f"{name} was curated by", "unknown" if curated is None else ", ".join(curated), ""))
    whole = {"judges": judges, "settings": result["settings"], "versions": result["versions"]}
    return {"pairs": pairs, "whole": json.dumps(whole, indent=2)}


def pinned(about: dict[str, Any]) -> tuple[str, str]:
    """A model's name, and the first digits of its revision or hash."""
    return about.get("name", ""), (about.get("revision") or about.get("fingerprint") or "")[:12]
