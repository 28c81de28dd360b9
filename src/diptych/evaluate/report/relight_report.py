"""The part of a run's report on relighting: scores against the true relit images, and the images of every method."""

from __future__ import annotations

from typing import Any

from diptych.data.images import open_image
from diptych.evaluate import relighting
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.render import plural, words
from diptych.evaluate.suites.scenes import Scenes

SHOWN = 4  # scenes


def view(run: Run) -> dict[str, Any]:
    """Scores against the true relit images, and the images of every method."""
    given = scores(run)
    return given | {"digits": {"psnr": 1}, "samples": samples(run, given["found"]) if given["found"] else []}


def scores(run: Run) -> dict[str, Any]:
    """Scores against the true relit images, what they say, and what the methods are called."""
    found = relighting.read(run.folder / "report" / "relight.json") or {}
    names = {m: name(m) for key in ("methods", "anchors") for m in found.get(key, {})}
    return {"found": found, "said": verdict(found) if found else "", "names": names}


def name(method: str) -> tuple[str, str]:
    """What a method is called, and what it is."""
    if method.endswith("_drawn"):
        return f"{name(method.removesuffix('_drawn'))[0]}, as drawn", "without the reference’s detail"
    if method.endswith("_told"):
        first, what = name(method.removesuffix("_told"))
        return f"{first}, told the scene", f"{what}, and of the scene"
    called, what = words()["relight_methods"].get(method, (method, ""))
    return called, what


def verdict(found: dict[str, Any]) -> str:
    """Whether a student beats every baseline, in a sentence; empty without one."""
    said, columns = [], words()["relight_scores"]
    for student in (s for s in ("student", "student_shipped") if s in found["comparisons"]):
        short = [
            f"{columns[key]} of {name(rival)[0]}"
            for rival, by in found["comparisons"][student].items()
            for key in relighting.HEADLINE
            if not by[key]["ahead"]
        ]
        who = name(student)[0]
        if not short:
            every = ", ".join(columns[key] for key in relighting.HEADLINE)
            said.append(f"The {who} beats every baseline on each of {every}, with intervals apart.")
        else:
            some = ", ".join(short[:4]) + (f" and {len(short) - 4} more" if len(short) > 4 else "")
            said.append(f"The {who} is not clearly ahead on {plural(len(short), 'count')}: {some}.")
    return " ".join(said)


def samples(run: Run, found: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The light asked for, and the cells: reference, truth, every method."""
    suite, seed = Scenes(), found["seeds"][0]
    wishes = suite.samples(min(SHOWN, found["scenes"]))
    drawn = [m for m in found["methods"] if not m.endswith("_drawn")]
    rows = {m: run.pictures(f"{relighting.FOLDER}/{m}", {f"{wish.id}-{seed}" for wish in wishes}) for m in drawn}
    made = []
    for wish in wishes:
        reference = suite.picture(wish)
        shown = {"reference": (reference, "The reference"), "truth": (suite.truth(wish), f"True: {wish.light}")}
        for method in drawn:
            row = rows[method].get(f"{wish.id}-{seed}")
            if row is None:
                continue
            image = open_image(row["image"])
            if method.startswith("student"):
                image = relighting.keep_detail(image, reference, found["detail"])
            shown[name(method)[0]] = image, f"{method}: {wish.light}"
        made.append((wish.light, [{"image": i, "alt": alt, "name": n, "line": None} for n, (i, alt) in shown.items()]))
    return made
