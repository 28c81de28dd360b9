"""The pictures of an evaluation's page: each model's best and worst, and some samples answered by everyone."""

from __future__ import annotations

from typing import Any

from diptych.data.images import open_image
from diptych.evaluate.report import scoresheet
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.html import figure, number, paragraph, picture, tag, text
from diptych.evaluate.report.page_tables import everyone, models

BEST = 6  # pictures shown at either end
SIDE_BY_SIDE = 5


def ends(run: Run) -> str:
    """Each model's best and worst pictures by CP × PF; ties go by name."""
    parts = []
    for name in models(run.metrics):
        lines = [
            x for (m, _), x in run.scores.items() if m == name and x.get("cp") is not None and x.get("pf") is not None
        ]
        lines.sort(key=lambda x: (-max(0.0, x["cp"]) * max(0.0, x["pf"]), -x["cp"] - x["pf"], x["id"]))
        few = min(BEST, max(1, len(lines) // 2))
        rows = run.pictures(name, {x["id"] for x in [*lines[:few], *lines[-few:]]})
        for said, chosen in (("the best", lines[:few]), ("the worst", lines[-few:][::-1])):
            parts.append(tag("h3", f"{text(scoresheet.name(name))}: {said}"))
            cells = "".join(_pair(rows[x["id"]], x) for x in chosen if x["id"] in rows)
            parts.append(tag("div", cells, class_="strip"))
    chosen_how = paragraph("Chosen by CP × PF of the single picture; left the reference, right what was drawn.")
    return chosen_how + "".join(parts)


def _pair(row: dict[str, Any], line: dict[str, Any]) -> str:
    images = picture(open_image(row["reference"]), "The reference") + picture(
        open_image(row["image"]), f"Drawn: {row['prompt']}"
    )
    marks = '<br><span class="miss">a copy</span>' if line.get("copied") else ""
    said = (
        f"<b>CP {number(max(0.0, line['cp']))} · PF {number(max(0.0, line['pf']))}</b><br>{text(row['prompt'])}{marks}"
    )
    return figure(tag("div", images, class_="duo"), said)


def side(run: Run) -> str:
    """Some samples, answered by everyone."""
    names = [name for name in everyone(run.metrics) if name != "copy"]
    lines = [x for (m, _), x in run.scores.items() if m == names[0] and x["seed"] == run.metrics["seeds"][0]]
    # An odd stride walks through the prompts, which take turns.
    stride = max(1, len(lines) // SIDE_BY_SIDE) | 1
    chosen = list(dict.fromkeys(lines[(i * stride) % len(lines)]["id"] for i in range(min(SIDE_BY_SIDE, len(lines)))))
    rows = {name: run.pictures(name, set(chosen)) for name in names}
    parts = [paragraph("One reference and one prompt a line, every method with the same noise; chosen by number.")]
    for id in chosen:
        row = rows[names[0]].get(id)
        if row is None:
            continue
        cells = [figure(picture(open_image(row["reference"]), "The reference"), "<b>reference</b>")]
        cells += [_cell(run, name, rows[name].get(id)) for name in names]
        body = tag("p", f"“{text(row['prompt'])}”") + tag("div", "".join(cells), class_="row")
        parts.append(tag("article", body, class_="sample"))
    return "".join(parts)


def _cell(run: Run, name: str, row: dict[str, Any] | None) -> str:
    if row is None:
        return figure("", f"<b>{text(scoresheet.name(name))}</b>failed")
    line = run.scores.get((name, row["id"]), {})
    said = f"<b>{text(scoresheet.name(name))}</b>"
    if line.get("cp") is not None and line.get("pf") is not None:
        said += f"CP {number(max(0.0, line['cp']))} · PF {number(max(0.0, line['pf']))}"
        said += '<br><span class="miss">a copy</span>' if line.get("copied") else ""
    return figure(picture(open_image(row["image"]), f"{scoresheet.name(name)}: {row['prompt']}"), said)
