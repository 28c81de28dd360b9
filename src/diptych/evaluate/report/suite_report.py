"""The report of `diptych evaluate --suite`: `report/report.html`, one file that loads nothing, and `report/report.md`.

It reads what was drawn and scored. What is shown is chosen here; `templates/suite.html.j2` and `templates/suite.md.j2`
say it, with the tables and charts of a run's report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.evaluate.evaluation import Evaluation
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.render import count, digits, named, number, part, percent, signed, template, words
from diptych.evaluate.report.run_report import side_by_side
from diptych.evaluate.scoring.metrics import p_said
from diptych.utils.io import write_atomic
from diptych.utils.models import BUILT_IN

OWN_COLOURS = 6  # of models; baselines and anchors have colors by name
BEST = 6  # images shown at either end
SIDE_BY_SIDE = 5


def write(out: Path) -> Path:
    """Writes the report of a scored evaluation and returns the page's path. UserError if it is not scored."""
    run = Run(Evaluation().recipe(), out)
    found = run.metrics
    if not found:
        raise UserError(f"{out} is not scored yet; first: diptych evaluate --out {out} --only score")
    names = everyone(found)
    shared: dict[str, Any] = {"found": found, "names": names}
    parts: list[tuple[str, str, dict[str, Any]]] = [
        ("scores", "Scores", scores(found)),
        ("compared", "Compared on the same samples", {"found": found}),
        ("published", "Beside published numbers", {"found": found, "known": words()["published"].get(found["suite"])}),
        ("groups", "By category and difficulty", shared | {"groups": groups(found)}),
        ("ends", "Best and worst", {"models": ends(run)}),
        ("side", "Side by side", {"samples": side(run)}),
        ("cost", "What a picture costs", {"found": found} | costs(found)),
        ("judge", "Who judged", judged(found)),
    ]
    made = [(anchor, heading, part("suite.html.j2", anchor, **given)) for anchor, heading, given in parts]
    header = part("suite.html.j2", "header", found=found, said=headline(found))
    page = template("page.html.j2").render(
        title=f"{found['suite']} · diptych",
        header=header,
        sections=[each for each in made if each[2].strip()],
        license="",
    )
    folder = out / "report"
    write_atomic(folder / "report.html", page.encode())
    known = words()["published"].get(found["suite"])
    text = template("suite.md.j2").render(found=found, said=headline(found), shown=measured(found), known=known)
    write_atomic(folder / "report.md", (text.strip() + "\n").encode())
    return folder / "report.html"


def everyone(found: dict[str, Any]) -> dict[str, Any]:
    """Methods, then anchors."""
    return {**found["methods"], **found["anchors"]}


def models(found: dict[str, Any]) -> list[str]:
    """The models' names; the baselines' where there are none."""
    return [name for name in found["methods"] if name in found["settings"]["models"]] or list(found["methods"])


def headline(found: dict[str, Any]) -> str:
    """The result in two sentences, `**bold**`."""
    ours = found["settings"]["models"]
    own = [name for name in models(found) if ours.get(name) not in BUILT_IN]  # the shipped one speaks for nobody else
    best = max(own or models(found), key=lambda name: found["methods"][name]["cp_pf"])
    mine = found["methods"][best]
    said = (
        f"{named(best)} reaches a CP·PF (subject kept × prompt followed) of **{number(mine['cp_pf'])}**, and "
        f"{percent(mine['copy_rate'], 1)} of its pictures copy their reference."
    )
    rivals = [name for name in found["methods"] if name not in ours]
    if not rivals or best in rivals:
        return said
    rival = max(rivals, key=lambda name: found["methods"][name]["cp_pf"])
    c = found["comparisons"][best][rival]
    gap = f"{signed(c['difference'])} ({signed(c['ci95'][0])} to {signed(c['ci95'][1])}, p {p_said(c)})"
    return f"{said} Against the best baseline, {named(rival)}: {gap}."


def measured(found: dict[str, Any]) -> dict[str, str]:
    """The columns that somebody has a number in."""
    return {key: said for key, said in words()["scores"].items() if any(key in s for s in everyone(found).values())}


def scores(found: dict[str, Any]) -> dict[str, Any]:
    """The table, the charts, held-out kinds, what was left out."""
    places = found["settings"]["models"]
    colours = {
        name: f"m{list(places).index(name) % OWN_COLOURS + 1}"
        if name in places
        else (name if name in words()["methods"] else "total")
        for name in everyone(found)
    }
    notes = {name: words()["methods"].get(name, ["", ""])[1] for name in everyone(found)}
    notes |= {name: "" if place == name else place for name, place in places.items()}
    lost = ", ".join(f"{name} {n}" for name, n in found["unjudged"].items() if n)
    return {"found": found, "shown": measured(found), "colours": colours, "notes": notes, "lost": lost}


def groups(found: dict[str, Any]) -> list[tuple[str, list[str], dict[str, Any]]]:
    """A breakdown of the scores: a title, its values, and each method's scores by value."""
    made = []
    for key, title in (("categories", "By category"), ("levels", "By difficulty")):
        by = {name: found[key].get(name, {}) for name in everyone(found)}
        values = list(dict.fromkeys(value for each in by.values() for value in each))
        if len(values) > 1:
            made.append((title, values, by))
    return made


def ends(run: Run) -> list[tuple[str, str, list[tuple[dict[str, Any], dict[str, Any]]]]]:
    """Each model's best and worst pictures by CP × PF; ties go by name."""
    made = []
    for name in models(run.metrics):
        own = [x for (method, _), x in run.scores.items() if method == name]
        lines = [x for x in own if x.get("cp") is not None and x.get("pf") is not None]
        lines.sort(key=lambda x: (-max(0.0, x["cp"]) * max(0.0, x["pf"]), -x["cp"] - x["pf"], x["id"]))
        few = min(BEST, max(1, len(lines) // 2))
        rows = run.pictures(name, {x["id"] for x in [*lines[:few], *lines[-few:]]})
        for said, chosen in (("the best", lines[:few]), ("the worst", lines[-few:][::-1])):
            made.append((name, said, [(rows[x["id"]], x) for x in chosen if x["id"] in rows]))
    return made


def side(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """Some samples, answered by everyone: the prompt and the cells."""
    names = [name for name in everyone(run.metrics) if name != "copy"]
    lines = [x for (m, _), x in run.scores.items() if m == names[0] and x["seed"] == run.metrics["seeds"][0]]
    # An odd stride walks through the prompts, which take turns.
    stride = max(1, len(lines) // SIDE_BY_SIDE) | 1
    chosen = list(dict.fromkeys(lines[(i * stride) % len(lines)]["id"] for i in range(min(SIDE_BY_SIDE, len(lines)))))
    rows = {name: run.pictures(name, set(chosen)) for name in names}
    first = [(id, rows[names[0]].get(id)) for id in chosen]
    return [
        (row["prompt"], side_by_side(run, row, {name: own.get(id) for name, own in rows.items()}))
        for id, row in first
        if row is not None
    ]


def costs(found: dict[str, Any]) -> dict[str, Any]:
    """Time, memory and money of a picture: the columns that are known, and a row of cells for each method."""
    methods = {name: s for name, s in found["methods"].items() if name != "copy"}
    columns: dict[str, list[str | None]] = {
        "s / picture": [_digits(s["seconds_per_image"]) for s in methods.values()],
        "peak memory": [_gigabytes(s["peak_memory_bytes"]) for s in methods.values()],
        "drawing": [_digits(s.get("drawing_cost")) for s in methods.values()],
        "judge tokens": [_tokens(s.get("judge_tokens_per_image")) for s in methods.values()],
        "judging": [_digits(s.get("judging_cost")) for s in methods.values()],
    }
    known = {head: cells for head, cells in columns.items() if any(cells)}
    rows = [(name, [cells[i] or "–" for cells in known.values()]) for i, name in enumerate(methods)]
    return {"head": list(known), "rows": rows}


def _digits(value: float | None) -> str | None:
    return None if value is None else digits(value)


def _gigabytes(size: int | None) -> str | None:
    return f"{size / 2**30:.2f} GiB" if size else None


def _tokens(mean: tuple[float, float] | None) -> str | None:
    return None if mean is None else f"{count(mean[0])} in, {count(mean[1])} out"


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """The judge, pinned; who curated; settings. A value is text, or a text and a hash."""
    judges, judge = found["judges"], found["judges"]["judge"]
    pairs: list[tuple[str, str, str]] = [("judge", judge["kind"], "")]
    pairs += [(role, *pinned(judge[role])) for role in ("scorer", "reader", "text") if role in judge]
    if "model" in judge:
        rubric = judge["rubric"]
        pairs += [("model", judge["model"], ""), ("answers to each question", judge["repeats"], "")]
        pairs += [("rubric", f"version {rubric['version']},", rubric["sha256"][:12])]
    pairs += [(words()["scores"][key], *pinned(about)) for key, about in judges.items() if key in words()["scores"]]
    for name, curated in judges["curated_by"].items():
        said = "nobody knows" if curated is None else ", ".join(curated)
        pairs.append((f"{name} was curated by", said, ""))
    whole = {"judges": judges, "settings": found["settings"], "versions": found["versions"]}
    return {"pairs": pairs, "whole": json.dumps(whole, indent=2)}


def pinned(about: dict[str, Any]) -> tuple[str, str]:
    """A model's name, and the start of its revision or hash."""
    return about.get("name", ""), (about.get("revision") or about.get("fingerprint") or "")[:12]
