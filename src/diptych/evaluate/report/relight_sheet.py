"""The report's part on relighting: scores against the true relit pictures, and the pictures of every method."""

from __future__ import annotations

from typing import Any

from diptych.data.images import open_image
from diptych.evaluate import relight
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.html import between, figure, missing, number, paragraph, picture, plural, table, tag, text
from diptych.evaluate.suites.relight import Scenes

NAMES = {
    "student": ("student", "asked for the light alone, as `diptych relight` asks"),
    "student_shipped": ("shipped student", "the one in the package, asked likewise"),
    "copy": ("copy", "the reference itself"),
    "colour_transfer": ("colour transfer", "Reinhard: the mean colour statistics of renders in the asked light"),
    "colour_shift": ("colour shift", "the mean difference that the asked light makes to them"),
    "text_only": ("text only", "the teacher, from the caption; it never sees the scene"),
    relight.ROUND_TRIP: ("truth through the VAE", "what a perfect student could show"),
}
TOLD, DRAWN = ", told the scene", ", as drawn"
COLUMNS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "features": "features",
    "structure": "structure",
    "following": "light",
    "relit": "relit",
}
DIGITS = {"psnr": 1}
SHOWN = 4  # scenes


def name(method: str) -> tuple[str, str]:
    """What a method is called, and what it is."""
    for ending, said, about in (
        ("_drawn", DRAWN, "without the reference’s detail"),
        ("_told", TOLD, "and of the scene"),
    ):
        if method.endswith(ending):
            first, what = name(method.removesuffix(ending))
            return first + said, about if ending == "_drawn" else f"{what}, {about}"
    return NAMES.get(method, (method, ""))


def result(run: Run) -> dict[str, Any]:
    return relight.read(run.folder / "report" / "relight.json") or {}


def table_and_pictures(run: Run) -> str:
    """The whole part, HTML."""
    found = result(run)
    if not found:
        return missing("Nothing has been relit yet.", "diptych evaluate does it.")
    parts = [
        paragraph(
            f"{found['scenes']} held-out scenes, each under three other lights (direction, colour, both): the renderer "
            "draws the true answer. <em>PSNR</em> and <em>SSIM</em> against it, higher is nearer; <em>features</em>, a "
            "distance in the scoring judge’s feature maps, lower is; <em>structure</em>, how well outlines lie where "
            "the reference has them; <em>light</em>, the share of what the words change that the attribute reader "
            "finds; <em>relit</em>, structure × light of each picture: that light on that scene. Small: 95 % intervals "
            "over scenes."
        )
    ]
    if said := verdict(found):
        parts.append(paragraph(text(said), class_="lead"))
    rows = []
    told = {**found["methods"], **found["anchors"]}
    for method, scores in told.items():
        first, what = name(method)
        cells = [f"{text(first)}<small>{text(what)}</small>"]
        cells += [
            number(scores[key], DIGITS.get(key, 2)) + between(scores["ci95"][key], DIGITS.get(key, 2))
            for key in COLUMNS
        ]
        rows.append([*cells, str(scores["n"])])
    muted = set(range(len(found["methods"]), len(rows)))
    parts.append(table(["method", *COLUMNS.values(), "n"], rows, "Against the true relit picture", muted))
    return "".join(parts) + _pictures(run, found)


def verdict(found: dict[str, Any]) -> str:
    """Whether a student beats every baseline, in a sentence; empty without one."""
    students = [s for s in ("student", "student_shipped") if s in found["comparisons"]]
    said = []
    for student in students:
        short = [
            f"{COLUMNS[key]} of {name(rival)[0]}"
            for rival, by in found["comparisons"][student].items()
            for key in relight.HEADLINE
            if not by[key]["ahead"]
        ]
        who = name(student)[0]
        if not short:
            scores = ", ".join(COLUMNS[key] for key in relight.HEADLINE)
            said.append(f"The {who} beats every baseline on each of {scores}, with intervals apart.")
        else:
            some = ", ".join(short[:4]) + (f" and {len(short) - 4} more" if len(short) > 4 else "")
            said.append(f"The {who} is not clearly ahead on {plural(len(short), 'count')}: {some}.")
    return " ".join(said)


def _pictures(run: Run, found: dict[str, Any]) -> str:
    suite, seed = Scenes(), found["seeds"][0]
    wishes = suite.samples(min(SHOWN, found["scenes"]))
    drawn = [m for m in found["methods"] if not m.endswith("_drawn")]
    rows = {m: run.pictures(f"{relight.FOLDER}/{m}", {f"{wish.id}-{seed}" for wish in wishes}) for m in drawn}
    parts = []
    for wish in wishes:
        reference = suite.picture(wish)
        cells = [figure(picture(reference, "The reference"), "<b>reference</b>")]
        cells.append(figure(picture(suite.truth(wish), f"True: {wish.light}"), "<b>truth</b>"))
        for method in drawn:
            row = rows[method].get(f"{wish.id}-{seed}")
            if row is None:
                continue
            image = open_image(row["image"])
            if method.startswith("student"):
                image = relight.keep_detail(image, reference, found["detail"])
            cells.append(figure(picture(image, f"{method}: {wish.light}"), f"<b>{text(name(method)[0])}</b>"))
        body = tag("p", f"“{text(wish.light)}”") + tag("div", "".join(cells), class_="row")
        parts.append(tag("article", body, class_="sample"))
    return "".join(parts)


def lines(run: Run) -> list[str]:
    """The table in Markdown; nothing where nothing was relit."""
    found = result(run)
    if not found or not run.recipe.evaluate.relight:
        return []
    rows = ["## Relighting", "", verdict(found), "", f"| method | {' | '.join(COLUMNS.values())} | n |"]
    rows.append("|---|" + "---:|" * (len(COLUMNS) + 1))
    for method, scores in {**found["methods"], **found["anchors"]}.items():
        cells = []
        for key in COLUMNS:
            digits, ends = DIGITS.get(key, 3), scores["ci95"][key]
            between_ = " [{:.{d}f}, {:.{d}f}]".format(*ends, d=digits) if ends else ""
            cells.append(f"{scores[key]:.{digits}f}{between_}")
        rows.append(f"| {name(method)[0]} | {' | '.join(cells)} | {scores['n']} |")
    return rows
