"""The report's second half: pictures of every method side by side, scores with intervals, and how far to trust them."""

from __future__ import annotations

from typing import Any

from diptych.data.images import open_image
from diptych.evaluate.report import html
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.html import (
    Dot,
    between,
    facts,
    figure,
    missing,
    number,
    paragraph,
    percent,
    picture,
    plural,
    share_range,
    signed,
    table,
    tag,
    text,
)
from diptych.evaluate.scoring import metrics

NAMES = {
    "student": ("student", "this run’s: one picture in, one picture out"),
    "student_shipped": ("shipped student", "the one in the package: the same recipe, run for longer"),
    "text_only": ("text only", "the teacher and the prompt; it never sees the reference"),
    "copy": ("copy", "the reference itself, whatever was asked"),
    "inpaint": ("inpaint", "the teacher draws a grid whose left panel is held to the reference; no training"),
    "truth": ("true re-render", "the asked picture from the renderer: what the scores can reach"),
    "other": ("another subject", "the asked scene with another of the kind: what ignoring the reference gets"),
}
ORDER = ("truth", "text_only", "copy", "inpaint", "student", "student_shipped")
BASELINES = ("text_only", "copy", "inpaint")
SHOWN = 6  # references shown of the main split
SHOWN_KINDS = 2  # and of held-out kinds
GROUPS = ("kind", "place", "light", "colour", "intensity", "pose", "prop", "weather", "framing")


def name(method: str) -> str:
    return NAMES.get(method, (method, ""))[0]


def headline(run: Run) -> str:
    """The result in a few sentences, HTML: the run's own student first, the shipped one named as such beside it; empty
    while there is none."""
    methods = run.metrics.get("methods", {})
    students = [m for m in ("student", "student_shipped") if m in methods]
    rivals = [m for m in BASELINES if m in methods]
    if not students or not rivals:
        return ""
    student, *others = students
    rival = max(rivals, key=lambda m: methods[m]["cp_pf"])
    mine, theirs = methods[student], methods[rival]
    best = f"the best zero-shot baseline, {name(rival)}, {number(theirs['cp_pf'])}"
    if mine["cp_pf"] > theirs["cp_pf"] > 0:
        against = f"{mine['cp_pf'] / theirs['cp_pf']:.1f} times {best}"
    else:
        against = f"{'not above' if mine['cp_pf'] <= theirs['cp_pf'] else 'against'} {best}"
    own, other = mine["ci95"]["cp_pf"], theirs["ci95"]["cp_pf"]
    overlap = "overlap" if own[0] <= other[1] and other[0] <= own[1] else "do not overlap"
    true = run.metrics.get("copy_rate_of_renders", {}).get("copy_rate")
    who = "this run’s student" if student == "student" else "the shipped student (not this run’s)"
    said = (
        f"On {text(run.metrics.get('identities', mine['n']))} subjects nobody trained on, {who} reaches a "
        f"CP·PF (subject kept × prompt followed) of <strong>{number(mine['cp_pf'])}</strong>, {against}; the 95 % "
        f"intervals {overlap}. "
        f"{percent(mine['copy_rate'], 1)} of its pictures look like copies of the reference; of true pictures of one "
        f"subject in two scenes, {percent(true, 1)} do."
    )
    for shipped in others:
        said += f" The shipped student, which this run did not train, reaches {number(methods[shipped]['cp_pf'])}."
    return said


def pictures(run: Run) -> str:
    """References × prompts: each method's picture, with what it got right."""
    methods = [m for m in ORDER if m in run.metrics.get("methods", {}) or m in run.metrics.get("anchors", {})]
    if not methods:
        return missing("The student has not been compared with anything yet.", _how(run))
    chosen = choose(run)
    rows = {m: run.pictures(m, set(chosen)) for m in methods}
    reference = next(iter(rows.values()))
    parts = [
        paragraph(
            "Each line is one reference and one prompt, answered by every method with the same noise. The lines were "
            "chosen by number, not by looks. Below a picture: <em>CP</em>, how much of the subject is kept; "
            "<em>PF</em>, how many of the asked attributes are found, with those missed; and whether it counts as a "
            "copy."
        )
    ]
    kinds = False
    for sample in chosen:
        if sample not in reference:
            continue
        row = reference[sample]
        if row["split"] != "identities" and not kinds:
            kinds = True
            parts.append(tag("h3", "Kinds that neither teacher, student nor judge has ever seen"))
        cells = [figure(picture(open_image(row["reference"]), "The reference"), "<b>reference</b>")]
        cells += [_cell(run, m, rows[m].get(sample)) for m in methods]
        body = tag("p", f"“{text(row['prompt'])}”") + tag("div", "".join(cells), class_="row")
        parts.append(tag("article", body, class_="sample"))
    return "".join(parts)


def choose(run: Run) -> list[str]:
    """Samples shown: references spread over each split, difficulties in turn, the first seed."""
    lines = [line for (method, _), line in run.scores.items() if method == "truth"]
    chosen = []
    for split, wanted in (("identities", SHOWN), ("kinds", SHOWN_KINDS)):
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


def _cell(run: Run, method: str, row: dict[str, Any] | None) -> str:
    if row is None:
        return figure("", f"<b>{text(name(method))}</b>failed")
    line = run.scores.get((method, row["id"]), {})
    said = [f"<b>{text(name(method))}</b>"]
    if line:
        met = line["met"]
        said.append(f"CP {number(max(0.0, line['cp']))} · PF {sum(met.values())}/{len(met)}")
        lost = [group for group, found in met.items() if not found]
        marks = (f"no {', '.join(lost)}" if lost else "", "a copy" if line["copied"] else "")
        said += [f'<br><span class="miss">{text(mark)}</span>' for mark in marks if mark]
    return figure(picture(open_image(row["image"]), f"{name(method)}: {row['prompt']}"), "".join(said))


def scores(run: Run) -> str:
    """The table, the chart, difficulty, attributes, comparisons, held-out kinds."""
    found = run.metrics
    if not found.get("methods"):
        return missing("There are no scores yet.", _how(run))
    first = next(iter(found["methods"].values()))
    parts = [
        paragraph(
            f"{text(found.get('identities', '?'))} held-out subjects × {text(found.get('prompts', '?'))} prompts × "
            f"{plural(len(found.get('seeds', [])), 'seed')} = {first['n']} pictures for each method. <em>CP</em> is "
            "the scoring judge’s similarity to the reference, 0 for another subject of the kind and 1 for the same "
            "subject in another scene. <em>PF</em> is the share of asked attributes found. Small: 95 % intervals "
            "over subjects."
        ),
        _table(found["methods"], found.get("anchors", {}), "Scores on held-out subjects"),
        _whiskers(found["methods"]),
        html.scatter(
            [_dot(m, s, "cp", "pf") for m, s in {**found["methods"], **found.get("anchors", {})}.items()],
            "Keeping the subject against following the prompt",
            "CP",
            "PF",
            "Dotted curves join equal CP·PF. A copy lies far right and low; ignoring the reference, high and left.",
        ),
    ]
    for reason in found.get("skipped", {}).items():
        parts.append(missing(f"{name(reason[0])} was left out:", reason[1]))
    parts.append(_comparisons(found))
    parts.append(_levels(found))
    kinds = found.get("splits", {}).get("kinds")
    if kinds:
        parts.append(tag("h3", "Kinds nobody has seen"))
        parts.append(
            paragraph("Teapots and snails were kept from teacher, student and judges alike. The scale is their own.")
        )
        parts.append(_table(kinds["methods"], kinds.get("anchors", {}), "Scores on held-out kinds"))
    return "".join(parts)


def _table(methods: dict[str, Any], anchors: dict[str, Any], caption: str) -> str:
    head = ["method", "CP", "PF", "CP·PF", "copy rate", "s / picture", "n"]
    rows = []
    for method, s in {**methods, **anchors}.items():
        ci = s.get("ci95", {})
        cells = [f"{text(name(method))}<small>{text(NAMES.get(method, ('', ''))[1])}</small>"]
        cells += [number(s[key]) + between(ci.get(key)) for key in ("cp", "pf", "cp_pf")]
        cells.append(percent(s["copy_rate"], 1) + share_range(ci.get("copy_rate")))
        speed = s.get("seconds_per_image")
        cells += ["–" if speed is None or method in anchors or method == "copy" else f"{speed:.2g}", str(s["n"])]
        rows.append(cells)
    return table(head, rows, caption, set(range(len(methods), len(rows))))


def _dot(method: str, s: dict[str, Any], x: str, y: str) -> Dot:
    ci = s.get("ci95", {})
    return Dot(name(method), method, s[x], s[y], ci.get(x), ci.get(y))


def _whiskers(methods: dict[str, Any]) -> str:
    ordered = sorted(methods.items(), key=lambda item: -item[1]["cp_pf"])
    dots = [Dot(name(m), m, s["cp_pf"], 0, s.get("ci95", {}).get("cp_pf")) for m, s in ordered]
    return html.whiskers(dots, "The headline", "CP·PF", "Mean CP × mean PF, with 95 % intervals.")


def _comparisons(found: dict[str, Any]) -> str:
    rows = []
    for student, by in found.get("comparisons", {}).items():
        for rival, c in by.items():
            apart = "yes" if c["intervals_apart"] else "no"
            ratio = "–" if c["ratio"] is None else f"{c['ratio']:.2f}×"
            gap = signed(c["difference"], 3) + between(c["ci95"], 3)
            p = text(metrics.p_said(c, 2).removeprefix("= "))
            rows.append([f"{text(name(student))} − {text(name(rival))}", gap, ratio, p, apart])
    if not rows:
        return ""
    head = ["CP·PF on the same samples", "difference", "ratio", "p", "intervals apart"]
    return tag("h3", "Paired comparisons") + table(head, rows, "Both methods resampled together, over subjects")


def _levels(found: dict[str, Any]) -> str:
    by_method = {m: found.get("levels", {}).get(m) for m in found["methods"]}
    by_method = {m: levels for m, levels in by_method.items() if levels}
    levels = list(next(iter(by_method.values()), {}))
    if not levels:
        return ""
    rows = [
        [text(name(m)), *(number(by.get(level, {}).get("cp_pf")) for level in levels)] for m, by in by_method.items()
    ]
    parts = [
        tag("h3", "By difficulty"),
        table(["method", *levels], rows, "CP·PF by what the prompt asks, easiest first"),
    ]
    rates = found.get("attributes", {})
    groups = [g for g in GROUPS if any(g in rates.get(m, {}) for m in by_method)]
    shown = [m for m in (*found["methods"], *found.get("anchors", {})) if rates.get(m)]
    lines = [[text(name(m)), *(percent(rates[m].get(g)) for g in groups)] for m in shown]
    muted = {i for i, m in enumerate(shown) if m in found.get("anchors", {})}
    parts.append(table(["found when asked", *groups], lines, "How often each asked attribute is found", muted))
    return "".join(parts)


def trust(run: Run) -> str:
    """The judges' own errors, and the scale."""
    found = run.metrics
    judges = found.get("judges")
    if not judges:
        return missing("The judges have not been measured yet.", _how(run))
    scale = found.get("calibration", {}).get("identities", {})
    renders = found.get("copy_rate_of_renders", {})
    parts = [
        paragraph(
            "Every number above was given by a model, so here is how often these models are wrong, on fresh renders "
            "that no one trained on. The judge that scores is not the one that curated the data; a run that tries is "
            "refused."
        )
    ]
    rows = []
    for role in ("scorer", "curator"):
        auc = judges.get(role, {}).get("auc", {})
        rows.append(
            [
                f"{role}<small>{text(judges.get(role, {}).get('name', ''))}</small>",
                *(number(auc.get(s), 3) for s in ("identities", "kinds")),
            ]
        )
    caption = "Chance of ranking the same subject above another of its kind (AUC)"
    parts.append(table(["judge", "held-out subjects", "held-out kinds"], rows, caption))
    reader = judges.get("reader", {})
    lines = []
    for label, key, split in (
        ("renders", "accuracy", "identities"),
        ("renders through the VAE", "accuracy_through_vae", "identities"),
        ("held-out kinds", "accuracy", "kinds"),
    ):
        right = reader.get(key, {}).get(split, {})
        if right:
            lines.append([label, *(percent(right.get(g)) for g in GROUPS)])
    if lines:
        parts.append(table(["reader right on", *GROUPS], lines, "The attribute reader’s accuracy"))
    if scale:
        parts.append(
            facts(
                [
                    ("similarity that counts as CP 0", number(scale.get("zero"), 3)),
                    ("similarity that counts as CP 1", number(scale.get("one"), 3)),
                    ("a copy is nearer than", number(scale.get("copy_distance"), 3)),
                    ("true re-renders that count as copies", percent(renders.get("copy_rate"), 1)),
                    ("renders that fix the scale", str(scale.get("pairs", "–"))),
                ]
            )
        )
    return "".join(parts)


def _how(run: Run) -> str:
    if run.recipe.evaluate.suite == "none":
        return "The recipe names no suite (evaluate.suite: none)."
    return "diptych evaluate does it."
