"""The tables and charts of an evaluation's page; each function takes `metrics.json` and returns HTML."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from diptych.data.images import open_image
from diptych.evaluate.report import html, scoresheet
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.html import (
    Dot,
    between,
    count,
    details,
    facts,
    figure,
    missing,
    number,
    paragraph,
    percent,
    picture,
    share_range,
    signed,
    table,
    tag,
    text,
)
from diptych.evaluate.scoring import metrics

OWN_COLOURS = 6  # of models; baselines and anchors have colours by name
COLUMNS = {
    "cp_pf": "CP·PF",
    "cp": "CP",
    "pf": "PF",
    "cp_pf_debiased": "CP·PF debiased",
    "cp_debiased": "CP debiased",
    "pf_debiased": "PF debiased",
    "dino": "DINO",
    "dinov2": "DINOv2",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "diversity": "diversity",
}
KEYS = ("cp_pf", "cp", "pf")  # the headline and what it is made of
JUDGED_BY = {
    "pocket": "<em>CP</em> is the pocket scorer’s similarity to the reference, 0 for another subject of the kind and 1 "
    "for the same subject in another scene; <em>PF</em> is the share of asked attributes that the reader finds.",
    "vlm": "<em>CP</em> and <em>PF</em> are a vision-language model’s scores from 0 to 4, divided by 4, the mean of "
    "several answers. <em>Debiased</em>: it was told to mark down pasted references.",
    "embedding": "<em>CP</em> is a vision model’s similarity to the reference, 0 for another reference of its "
    "category; <em>PF</em> is how much better the picture fits its prompt than the reference’s other prompts, 0 for "
    "no better.",
}


@cache
def published() -> dict[str, Any]:
    """Rows of papers, by suite."""
    import yaml

    return yaml.safe_load((Path(__file__).parent / "published.yaml").read_text("utf8"))


def everyone(found: dict[str, Any]) -> dict[str, Any]:
    """Methods, then anchors."""
    return {**found["methods"], **found["anchors"]}


def models(found: dict[str, Any]) -> list[str]:
    """The models' names; the baselines' where there are none."""
    return [name for name in found["methods"] if name in found["settings"]["models"]] or list(found["methods"])


def colour(found: dict[str, Any], name: str) -> str:
    """A colour of report.css."""
    if name in found["settings"]["models"]:
        return f"m{list(found['settings']['models']).index(name) % OWN_COLOURS + 1}"
    return name if name in scoresheet.NAMES else "total"


def p_text(found: dict[str, Any]) -> str:
    """A comparison's p-value: `= 0.042`, `< 0.001`, or why there is none; HTML."""
    return text(metrics.p_said(found))


def scores(found: dict[str, Any]) -> str:
    """The table, the intervals, the chart."""
    kind = found["judges"]["judge"]["kind"]
    shown = measured(found)
    head = ["method", *shown.values(), "copy rate", "n"]
    rows = []
    for name, s in everyone(found).items():
        cells = [f"{text(scoresheet.name(name))}<small>{text(note(found, name))}</small>"]
        cells += [number(s.get(key)) + between(s.get("ci95", {}).get(key)) for key in shown]
        copies = percent(s["copy_rate"], 1) + share_range(s.get("ci95", {}).get("copy_rate"))
        rows.append([*cells, copies, str(s["n"])])
    muted = set(range(len(found["methods"]), len(rows)))
    dots = [
        Dot(scoresheet.name(n), colour(found, n), s["cp"], s["pf"], s["ci95"]["cp"], s["ci95"]["pf"])
        for n, s in everyone(found).items()
    ]
    ordered = sorted(found["methods"].items(), key=lambda item: -item[1]["cp_pf"])
    lines = [Dot(scoresheet.name(n), colour(found, n), s["cp_pf"], 0, s["ci95"]["cp_pf"]) for n, s in ordered]
    parts = [
        paragraph(
            JUDGED_BY[kind],
            "<em>CP·PF</em> is the product of the means. <em>Copy rate</em> is the share of pictures that repeat their "
            "reference pixel for pixel, shifts and mirrors included. Small: 95 % intervals over references.",
        ),
        table(head, rows, "Scores", muted),
        html.scatter(
            dots,
            "Keeping the subject against following the prompt",
            "CP",
            "PF",
            "Dotted curves join equal CP·PF. A copy lies far right and low; ignoring the reference, high and left.",
        ),
        html.whiskers(lines, "The headline", "CP·PF", "Mean CP × mean PF, with 95 % intervals."),
    ]
    if kinds := found["splits"].get("kinds"):
        again = [
            [
                text(scoresheet.name(n)),
                *(number(s[key]) + between(s["ci95"][key]) for key in KEYS),
                str(s["n"]),
            ]
            for n, s in {**kinds["methods"], **kinds["anchors"]}.items()
        ]
        head_of_kinds = ["method", *(COLUMNS[key] for key in KEYS), "n"]
        parts.append(tag("h3", "Kinds nobody has seen"))
        parts.append(table(head_of_kinds, again, "Scores on held-out kinds, on their own scale", muted))
    lost = {name: n for name, n in found["unjudged"].items() if n}
    if lost:
        said = ", ".join(f"{name} {n}" for name, n in lost.items())
        parts.append(missing("The judge gave no valid answer about some pictures, which are left out:", said))
    return "".join(parts)


def measured(found: dict[str, Any]) -> dict[str, str]:
    """The columns that somebody has a number in."""
    return {key: said for key, said in COLUMNS.items() if any(key in s for s in everyone(found).values())}


def note(found: dict[str, Any], name: str) -> str:
    """What a method is, in a few words."""
    place = found["settings"]["models"].get(name)
    if place is not None:
        return "" if place == name else place
    return scoresheet.NAMES.get(name, ("", ""))[1]


def compared(found: dict[str, Any]) -> str:
    """Each model against each other method."""
    rows = [
        [
            f"{text(scoresheet.name(a))} − {text(scoresheet.name(b))}",
            signed(c["difference"], 3) + between(c["ci95"], 3),
            "–" if c["ratio"] is None else f"{c['ratio']:.2f}×",
            p_text(c).removeprefix("= "),
            str(c["n"]),
        ]
        for a, by in found["comparisons"].items()
        for b, c in by.items()
    ]
    if not rows:
        return ""
    said = paragraph(
        "Differences of CP·PF on the pictures that both have. The p-value is a permutation test’s: as if a coin had "
        "said, for each reference, which method drew which pictures. Many comparisons at once need a stricter eye."
    )
    return said + table(["CP·PF", "difference", "ratio", "p", "n"], rows, "Paired over references")


def beside(found: dict[str, Any]) -> str:
    """Our rows and the papers'."""
    known = published().get(found["suite"])
    if known is None:
        return ""
    columns = known["columns"]
    rows = [
        [f"<b>{text(scoresheet.name(n))}</b><small>here</small>", *(number(s.get(key), 3) for key in columns)]
        for n, s in found["methods"].items()
    ]
    own = len(rows)
    rows += [[text(n), *(number(row.get(key), 3) for key in columns)] for n, row in known["rows"].items()]
    warning = missing(
        "Not comparable across harnesses.",
        "Another judge, other crops, other seeds move these numbers by more than most methods differ. A ranking needs "
        "every method in one harness; the published rows are here to show the order of size.",
    )
    head = ["method", *(COLUMNS[key] for key in columns)]
    return warning + table(head, rows, f"Grey: published. {text(known['source'])}", set(range(own, len(rows))))


def groups(found: dict[str, Any]) -> str:
    """CP·PF by category and by level."""
    parts = []
    for key, title in (("categories", "By category"), ("levels", "By difficulty")):
        by = {name: found[key].get(name, {}) for name in everyone(found)}
        values = list(dict.fromkeys(value for each in by.values() for value in each))
        if len(values) < 2:
            continue
        rows = []
        for name, each in by.items():
            cells = [
                f"{number(each[v]['cp_pf'])}<span class='ci'>{number(each[v]['cp'])} × {number(each[v]['pf'])}</span>"
                if v in each
                else "–"
                for v in values
            ]
            rows.append([text(scoresheet.name(name)), *cells])
        muted = set(range(len(found["methods"]), len(rows)))
        parts.append(tag("h3", title) + table(["method", *map(text, values)], rows, "CP·PF; small: CP × PF", muted))
    return "".join(parts)


def costs(found: dict[str, Any]) -> str:
    """Time, memory and money of a picture."""
    price = found["settings"]["hour_price"]
    columns: dict[str, Callable[[dict[str, Any]], str | None]] = {
        "s / picture": lambda s: _digits(s.get("seconds_per_image")),
        "peak memory": lambda s: f"{s['peak_memory_bytes'] / 2**30:.2f} GiB" if s.get("peak_memory_bytes") else None,
        "drawing": lambda s: _digits(s.get("drawing_cost")),
        "judge tokens": lambda s: _tokens(s.get("judge_tokens_per_image")),
        "judging": lambda s: _digits(s.get("judging_cost")),
    }
    methods = {name: s for name, s in found["methods"].items() if name != "copy"}
    cells = {head: [cell(s) for s in methods.values()] for head, cell in columns.items()}
    kept = {head: own for head, own in cells.items() if any(own)}
    rows = [[text(scoresheet.name(name)), *(own[i] or "–" for own in kept.values())] for i, name in enumerate(methods)]
    said = (
        "Seconds are the median over batches, model loading left out; memory is the most that a batch held (of the "
        "whole process on a CPU). "
    )
    said += f"Drawing at {price:g} an hour." if price is not None else "With --set hour_price=… drawing has a price."
    where = f"On {text(found['machine']['device'])}, {text(found['machine']['processor'])}"
    return paragraph(said) + table(["method", *kept], rows, where) if rows else ""


def _digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.2g}"


def _tokens(mean: Sequence[float] | None) -> str | None:
    return None if mean is None else f"{count(mean[0])} in, {count(mean[1])} out"


def judged(found: dict[str, Any]) -> str:
    """The judge, pinned; who curated; settings."""
    judges = found["judges"]
    pairs: list[tuple[str, str]] = [("judge", text(judges["judge"]["kind"]))]
    for role in ("scorer", "reader", "text"):
        if role in judges["judge"]:
            pairs.append((role, pinned(judges["judge"][role])))
    if "model" in judges["judge"]:
        rubric = judges["judge"]["rubric"]
        pairs += [
            ("model", text(judges["judge"]["model"])),
            ("answers to each question", text(judges["judge"]["repeats"])),
        ]
        pairs += [
            ("rubric", f"version {text(rubric['version'])}, {tag('span', text(rubric['sha256'][:12]), class_='mono')}")
        ]
    pairs += [(COLUMNS[key] or key, pinned(about)) for key, about in judges.items() if key in COLUMNS]
    for name, curated in judges["curated_by"].items():
        pairs.append((f"{name} was curated by", "nobody knows" if curated is None else text(", ".join(curated))))
    whole = json.dumps({"judges": judges, "settings": found["settings"], "versions": found["versions"]}, indent=2)
    return facts(pairs) + details(
        "Models, preprocessing and settings in full", tag("pre", tag("code", text(whole)), tabindex="0")
    )


def pinned(about: dict[str, Any]) -> str:
    """A model with its revision or hash."""
    mark = about.get("revision") or about.get("fingerprint") or ""
    return f"{text(about.get('name', ''))} <span class='mono'>{text(mark[:12])}</span>"


# The pictures of an evaluation's page: each model's best and worst, and some samples answered by everyone.

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
