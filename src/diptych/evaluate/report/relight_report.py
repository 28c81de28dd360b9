"""The relighting section of a run's report: scores against the true images, and the images of every method."""

from __future__ import annotations

from typing import Any

from diptych.data.images import open_image
from diptych.evaluate import relighting
from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.render import plural, words
from diptych.evaluate.suites.scenes import Scenes

SHOWN = 4  # scenes


def view(run: Run) -> dict[str, Any]:
    """Scores against the true images, and the images of every method."""
    given = scores(run)
    return given | {"digits": {"psnr": 1}, "samples": samples(run, given["result"]) if given["result"] else []}


def scores(run: Run) -> dict[str, Any]:
    """Scores against the true images, a summary in words, and the methods' names."""
    result = run.json(relighting.RESULT)
    names = {m: name(m) for key in ("methods", "anchors") for m in result.get(key, {})}
    return {"result": result, "summary": verdict(result) if result else "", "names": names}


def name(method: str) -> tuple[str, str]:
    """Name and description of a method."""
    if method.endswith("_drawn"):
        return f"{name(method.removesuffix('_drawn'))[0]}, raw", "without the reference’s detail"
    if method.endswith("_told"):
        first, about = name(method.removesuffix("_told"))
        return f"{first}, with the scene", f"{about}, and a description of the scene"
    short, about = words()["relight_methods"].get(method, (method, ""))
    return short, about


def verdict(result: dict[str, Any]) -> str:
    """Whether each student beats every baseline, in a sentence; empty without a student."""
    sentences, columns = [], words()["relight_scores"]
    for student in (s for s in ("student", "student_shipped") if s in result["comparisons"]):
        behind = [
            f"{columns[key]} of {name(rival)[0]}"
            for rival, by in result["comparisons"][student].items()
            for key in relighting.HEADLINE
            if not by[key]["ahead"]
        ]
        who = name(student)[0]
        if not behind:
            every = ", ".join(columns[key] for key in relighting.HEADLINE)
            sentences.append(f"The {who} beats every baseline on each of {every}, with intervals apart.")
        else:
            some = ", ".join(behind[:4]) + (f" and {len(behind) - 4} more" if len(behind) > 4 else "")
            sentences.append(f"The {who} is not clearly ahead on {plural(len(behind), 'count')}: {some}.")
    return " ".join(sentences)


def samples(run: Run, result: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The requested light of each sample, and its cells: reference, truth, every method."""
    suite, seed = Scenes(), result["seeds"][0]
    shown = suite.samples(min(SHOWN, result["scenes"]))
    methods = [m for m in result["methods"] if not m.endswith("_drawn")]
    rows = {m: run.images(f"{relighting.FOLDER}/{m}", {f"{each.id}-{seed}" for each in shown}) for m in methods}
    made = []
    for sample in shown:
        reference = suite.reference_image(sample)
        images = {"reference": (reference, "The reference"), "truth": (suite.truth(sample), f"True: {sample.light}")}
        for method in methods:
            row = rows[method].get(f"{sample.id}-{seed}")
            if row is None:
                continue
            image = open_image(row["image"])
            if method.startswith("student"):
                image = relighting.keep_detail(image, reference, result["detail"])
            images[name(method)[0]] = image, f"{method}: {sample.light}"
        cells = [{"image": image, "alt": alt, "name": label, "line": None} for label, (image, alt) in images.items()]
        made.append((sample.light, cells))
    return made
