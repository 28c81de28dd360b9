"""The report's first half, a function for each stage that makes data or weights: what it did, words and pictures."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from diptych.data import records
from diptych.data.images import open_image
from diptych.evaluate.report import html
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.html import (
    Dot,
    Series,
    count,
    facts,
    figure,
    missing,
    number,
    paragraph,
    percent,
    picture,
    plural,
    strip,
    tag,
    text,
)
from diptych.recipe import tasks

REASONS = {
    "kept": "kept",
    "seam": "no clear seam between the panels: not a grid",
    "near_copy": "the second panel nearly repeats the first",
    "near_copy: hash": "the second panel is the first in another brightness or tint, by their hashes",
    "near_copy: mirrored": "the second panel mirrors the first",
    "near_copy: embedding": "the second panel shows too nearly what the first shows, by their embeddings",
    "unasked": "other limits let it through, and no judge was asked about it",
    "prefilter": "too unlike for the judge to be asked",
    records.DIFFERENT: "the judge does not see the same subject",
    "alignment": "the outlines of the two panels do not lie over each other",
    "duplicate: hash": "both panels repeat an earlier pair’s, by their hashes",
    "duplicate: embedding": "both panels repeat an earlier pair’s, by their embeddings",
    "unchanged": "the light, or what else the task changes, is as it was",
}
SEAM = "seam"  # the refusal of a grid, and so of all its pairs
SMOOTH = 0.96
SIGMA_COLOURS = ("1", "2", "3", "4", "5")


def flow(run: Run) -> str:
    """The way of the data in five numbers."""
    steps = [("prompts written", run.rows("prompts")), ("grids painted", run.rows("grids"))]
    steps += [("candidate pairs", run.rows("candidates")), ("pairs kept", run.rows("pairs"))]
    steps += [("training steps", run.trained.get("steps") or (run.training[-1]["step"] if run.training else None))]
    cells = (f"<b>{count(n) if n is not None else '–'}</b><span>{text(name)}</span>" for name, n in steps)
    return tag("ol", "".join(tag("li", cell) for cell in cells), class_="flow")


def method(run: Run) -> str:
    """The idea in a paragraph."""
    return paragraph(
        "A text-to-image model can be asked for a picture of several panels that show one subject. "
        "Diffusion Self-Distillation takes it at its word. The model, now the <em>teacher</em>, draws many such grids; "
        "a judge keeps those whose panels really show the same individual; cut apart, they are pairs of "
        "<em>reference</em> and <em>target</em>. On these the model itself is trained further, as a <em>student</em> "
        "that sees a reference on the left half of its canvas and draws the target on the right. Nobody drew, "
        "collected or labelled a picture. (Cai et al., arXiv 2411.18616.)"
    ) + paragraph(
        "In words, the subjects below are only “a cat” or “a robot”: colours, pattern, face and shape are never named. "
        "So whatever the student preserves of them, it took from the reference."
        if run.recipe.teacher == "pocket"
        else ""
    )


def write(run: Run) -> str:
    """Stage 1."""
    rows = run.first("prompts", 4)
    if not rows:
        return missing("No prompts have been written yet.", "diptych write makes them.")
    said = "".join(tag("li", text(row["prompt"])) for row in rows)
    subjects = Counter(row["subject"] for row in run.data("prompts").columns("subject"))
    spread = ", ".join(f"{text(name)} {n}" for name, n in subjects.most_common(14))
    return (
        paragraph(
            f"{count(sum(subjects.values()))} prompts, each for one picture of two panels. The writer is a grammar: it "
            "draws a kind, two scenes and a wording, and names the kind of the subject but nothing that tells one "
            "individual from another."
        )
        + tag("ul", said, class_="words")
        + paragraph(f"Subjects: {spread}{'…' if len(subjects) > 14 else ''}.", class_="note")
    )


def paint(run: Run) -> str:
    """Stage 2."""
    rows = run.first("grids", 6)
    if not rows:
        return missing("No grids have been painted yet.", "diptych paint makes them.")
    settings = run.recipe.paint
    guidance = f" with guidance {settings.true_guidance:g}" if settings.true_guidance != 1 else ""
    figures = (figure(picture(open_image(r["image"]), f"Grid: {r['prompt']}", wide=2), text(r["prompt"])) for r in rows)
    failed = run.failures.get("paint", 0)
    return paragraph(
        f"The teacher drew {count(run.rows('grids') or 0)} grids in {settings.steps} steps each{guidance}. It tries "
        "to show the same subject twice, and often fails: a colour, a hat or a whole shape changes from panel to "
        "panel. These are the first ones, good or bad." + (f" {failed} could not be drawn." if failed else "")
    ) + strip(figures)


def curate(run: Run) -> str:
    """Stage 3: funnel, verdicts, the judge's numbers."""
    rows = run.candidates
    if not rows:
        return missing("No pairs have been judged yet.", "diptych curate judges them.")
    reasons = Counter(row["reason"] for row in rows)
    kept = reasons.get("kept", 0)
    limits = tasks.load(run.recipe.task).thresholds(run.recipe.curate.thresholds)
    parts = [
        paragraph(
            f"Every grid is cut into panels, and every ordered pair of panels is a candidate. Of {count(len(rows))} "
            f"candidates {count(kept)} were kept, {percent(kept / len(rows))}. A candidate is refused by the first "
            "test it fails; all keep their numbers, so that a threshold can be changed without judging again."
        ),
        html.bars(_funnel(run, reasons)),
        verdicts(run, reasons),
    ]
    parts.append(
        html.histogram(
            [row["similarity"] for row in rows if row["reason"] in ("kept", records.DIFFERENT)],
            limits.same,
            "What the judge saw",
            "similarity of the two subjects",
            f"The dashed line is the recipe’s threshold, {limits.same:g}; what lies right of it is kept.",
        )
    )
    return "".join(parts) + quality(run)


def _funnel(run: Run, reasons: Counter[str]) -> list[tuple[str, float, str, str]]:
    prompts, grids, pairs = run.rows("prompts") or 0, run.rows("grids") or 0, run.rows("pairs")
    judged = sum(times for reason, times in reasons.items() if reason != SEAM)
    seen = {row["id"].rpartition("-")[0] for row in run.candidates}
    cut = len({row["id"].rpartition("-")[0] for row in run.candidates if row["reason"] != SEAM})
    kept = pairs if pairs is not None else reasons.get("kept", 0)
    lost = [f"{count(n)}: {text(REASONS.get(r, r))}" for r, n in reasons.most_common() if r not in ("kept", SEAM)]

    def failed(stage: str) -> str:
        n = run.failures.get(stage, 0)
        return f"{count(n)} failed" if n else ""

    seamless = f"{plural(len(seen) - cut, 'grid')} without a clear seam" if len(seen) > cut else ""
    made = f"{plural(judged, 'ordered pair')} of panels"
    both = "; ".join(part for part in (failed("curate"), seamless, made) if part)
    # Bars count grids all the way: a pair is its share of one.
    share = kept * cut / judged if judged else 0.0
    return [
        ("prompts", float(prompts), count(prompts), failed("write")),
        ("grids painted", float(grids), count(grids), failed("paint")),
        ("grids cut, judged", float(cut), count(cut), both),
        ("pairs kept", share, count(kept), "refused: " + "; ".join(lost) if lost else ""),
    ]


def verdicts(run: Run, reasons: Counter[str]) -> str:
    """Strips of pairs with the judge's verdict."""
    parts = []
    for reason in ["kept", *(r for r, _ in reasons.most_common() if r != "kept")]:
        found = run.examples(reason, 6 if reason in ("kept", records.DIFFERENT) else 3)
        if found:
            parts.append(tag("h3", text("Kept" if reason == "kept" else f"Refused: {REASONS.get(reason, reason)}")))
            parts.append(strip(_pair(row) for row in found))
    return "".join(parts)


def _pair(row: dict[str, Any]) -> str:
    pictures = picture(open_image(row["conditioning"]), f"Reference: {row['reference_caption']}") + picture(
        open_image(row["image"]), f"Target: {row['caption']}"
    )
    verdict = '<span class="kept">kept</span>' if row["kept"] else f'<span class="refused">{text(row["reason"])}</span>'
    said = f"{verdict} · similarity {number(row['similarity'])} · copy distance {number(row['copy_distance'])}"
    return figure(tag("div", pictures, class_="duo"), f"{said}<br>{text(row['caption'])}")


def quality(run: Run) -> str:
    """How good curation is, where the truth is known, and the reader's estimate where it is not."""
    measured = run.metrics.get("curation")
    if not measured:
        return missing("How precise curation is has not been measured yet.", "diptych evaluate measures it.")
    parts = [tag("h3", "How good is the judge?")]
    renders = measured["renders"]
    prior = ", ".join(f"{percent(share)} {text(name)}" for name, share in renders["prior"].items())
    best = renders["threshold_for_95"]
    parts.append(
        paragraph(
            f"On {text(renders['pairs'])} pairs drawn by the renderer, where the truth is known, passed through the "
            f"teacher’s VAE and blurred ({prior}): at the recipe’s threshold of {renders['threshold']:g}, precision is "
            f"<strong>{percent(renders['precision'], 1)}</strong> and recall "
            f"<strong>{percent(renders['recall'], 1)}</strong>. "
            + (
                f"The threshold that keeps the most at 95 % precision or better is {best:.2f}, "
                f"with a recall of {percent(renders['recall_at_95'])}."
                if best is not None
                else "No threshold reaches 95 % precision."
            )
        )
    )
    points = [(recall, precision) for _, precision, recall in renders["curve"]]
    parts.append(
        html.lines(
            [Series("every threshold", "inpaint", points)],
            "Precision and recall of curation on known pairs",
            "recall",
            "precision",
            marks=[Dot("the recipe’s threshold", "student", renders["recall"], renders["precision"] or 0.0)],
        )
    )
    return "".join(parts) + _estimate(measured.get("grids"))


def _estimate(grids: dict[str, Any] | None) -> str:
    if not grids or not grids.get("reader"):
        return ""
    reader = grids["reader"]

    errors = (
        f"On known pairs the reader finds {percent(reader['hit_rate'])} of the same subjects and takes "
        f"{percent(reader['false_alarm_rate'])} of the others for the same"
    )
    known = [reader[key] for key in ("all", "kept", "rejected") if reader[key]]
    if any(part["corrected"] is None for part in known):
        return paragraph(
            "On the teacher’s own grids nobody knows the truth, and the attribute reader is too unsure to estimate it. "
            f"{errors}."
        )

    def share(part: dict[str, Any] | None) -> str:
        if part is None:
            return "– (there are none)"
        low, high = part["ci95"]
        return (
            f"<strong>{percent(part['corrected'])}</strong> ({percent(low)} to {percent(high)}, n = {text(part['n'])})"
        )

    return paragraph(
        "On the teacher’s own grids nobody knows the truth. The attribute reader, which had no say in curation, "
        f"estimates how many pairs show one individual: of all {share(reader['all'])}, of the kept "
        f"{share(reader['kept'])}, of the refused {share(reader['rejected'])}. {errors}; the estimates are corrected "
        "for both."
    )


def distill(run: Run) -> str:
    """Stage 4: losses and the sample sheet."""
    lines = run.training
    if not lines:
        return missing("No student has been trained yet.", "diptych distill trains it.")
    settings, summary = run.recipe.distill, run.trained
    pairs = f" on {count(summary['pairs'])} pairs" if "pairs" in summary else ""
    way = "all weights trained" if settings.mode == "full" else f"LoRA of rank {settings.rank} and the input layer"
    parts = [
        paragraph(
            f"The teacher’s first layer was widened with zeros for the reference, then the model trained for "
            f"{count(lines[-1]['step'])} steps of {settings.batch_size}{pairs} ({way}). The loss covers both panels: "
            "on the left the student learns to reproduce the reference, on the right to draw the target."
        )
    ]
    left, right = ([(x["step"], x[side]) for x in lines if side in x] for side in ("left", "right"))
    curves = [Series("", "left", left, True), Series("", "right", right, True)]
    curves = curves if len(lines) > 60 else []
    curves += [Series("left panel", "left", smooth(left)), Series("right panel", "right", smooth(right))]
    shown = [html.lines(curves, "Training loss", "step", "mean squared error")]
    validated = [(x["step"], x["validation"]) for x in lines if x.get("validation")]
    for side in ("left", "right") if validated else ():
        levels = list(validated[-1][1].get(side, {}))
        by_level = [
            Series(
                f"σ = {level}", SIGMA_COLOURS[i % 5], [(s, v[side][level]) for s, v in validated if level in v[side]]
            )
            for i, level in enumerate(levels)
        ]
        caption = f"Pairs held out of training, at fixed noise; {side} panel, by noise level σ."
        shown.append(html.lines(by_level, f"Validation loss, {side} panel", "step", "mean squared error", caption))
    parts.append(tag("div", "".join(shown), class_="pairs"))
    if run.sheet:
        name, image = run.sheet
        step = name.removeprefix("step-").lstrip("0") or "0"
        parts.append(tag("h3", "Drawn by the student in training"))
        said = f"Step {step}, held-out pairs: reference · target as the teacher drew it · the student’s picture."
        parts.append(figure(picture(image, said, wide=3), text(said)))
    return "".join(parts)


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


def cost(run: Run) -> str:
    """What it took, and what made it."""
    spent = run.seconds
    start = run.start
    machine: dict[str, Any] = {**start.get("machine", {}), **run.metrics.get("machine", {})}
    parts = []
    if spent:
        most = [(name, seconds, duration(seconds), "") for name, seconds in spent.items()]
        parts.append(html.bars(most))
        parts.append(
            paragraph(
                f"{duration(sum(spent.values()))} in all, in {plural(max(1, run.sittings), 'sitting')}.", class_="note"
            )
        )
    else:
        parts.append(missing("The log holds no finished stage yet, so there are no times to show.", ""))
    known = [
        (key, text(machine[key])) for key in ("processor", "cores", "threads", "device", "system") if key in machine
    ]
    parts.append(facts(known))
    versions: dict[str, Any] = {**start.get("versions", {}), **run.metrics.get("versions", {})}
    parts.append(paragraph(" · ".join(f"{text(k)} {text(v)}" for k, v in versions.items()), class_="note"))
    return "".join(parts)


def provenance(run: Run) -> list[tuple[str, str]]:
    """(what, fingerprint) of every data set and model that the run names."""
    found: list[tuple[str, str]] = []
    for name in ("prompts", "grids", "candidates", "pairs"):
        manifest = run.data(name).manifest or {}
        if manifest.get("fingerprint"):
            found.append((name, manifest["fingerprint"]))
        found += [
            (key.removesuffix("_sha256"), manifest[key])
            for key in ("teacher_sha256", "judge_sha256")
            if key in manifest
        ]
    for role, about in run.metrics.get("judges", {}).items():
        if role != "curator" and about.get("fingerprint"):
            found.append((role, about["fingerprint"]))
    trained = run.folder / "student" / "training" / "summary.json"
    if trained.is_file():
        try:
            made_by = json.loads(trained.read_text("utf8")).get("made_by", {})
        except ValueError:
            made_by = {}
        found += [(f"student’s {key}", made_by[key]) for key in ("base", "pairs") if key in made_by]
    return list(dict.fromkeys(found))


def duration(seconds: float) -> str:
    """`48 s`, `12 min 30 s`, `3 h 04 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
