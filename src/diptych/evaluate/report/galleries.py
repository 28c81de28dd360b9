"""The images of a report: held-out references with the student's images, all methods side by side, and how the student
learned. Nothing is selected by appearance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diptych.evaluate.report.gather import Run
from diptych.evaluate.report.render import named

if TYPE_CHECKING:
    from PIL.Image import Image

ORDER = ("truth", "text_only", "copy", "inpaint", "student", "student_shipped")
SHOWN = (("identities", 6), ("kinds", 2))  # references of each split
OPENING = 4  # references that open the report, large
GALLERY = 40  # references with all their images, at most
STEPS, LINES = 6, 4  # sample sheets and lines that show how the student learned


def gallery(run: Run) -> dict[str, Any]:
    """Held-out references, and the student's image for every prompt: a few large ones, then all or evenly spaced
    ones."""
    student = next((m for m in ("student", "student_shipped") if m in run.metrics.get("methods", {})), None)
    if student is None:
        return {"student": None, "first": [], "rest": [], "total": 0, "how": how(run)}
    by: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for (method, _), line in sorted(run.scores.items()):
        if method == student:
            by.setdefault((line["split"], line["identity"]), []).append(line)
    keys = sorted(by, key=lambda key: (key[0] != "identities", key[1]))
    shown = [keys[i * len(keys) // min(len(keys), GALLERY)] for i in range(min(len(keys), GALLERY))]
    rows = run.images(student, {line["id"] for key in shown for line in by[key]})
    references: list[dict[str, Any]] = []
    for key in shown:
        cells = [{"line": line, "row": rows.get(line["id"])} for line in by[key]]
        first = next((cell["row"] for cell in cells if cell["row"] is not None), None)
        if first is not None:
            references.append({"reference": first["reference"], "new_kind": key[0] != "identities", "cells": cells})
    return {
        "student": student,
        "first": references[:OPENING],
        "rest": references[OPENING:],
        "total": len(keys),
        "how": how(run),
    }


def images(run: Run) -> dict[str, Any]:
    """References × prompts: each method's image, with its scores."""
    methods = [m for m in ORDER if m in run.metrics.get("methods", {}) or m in run.metrics.get("anchors", {})]
    chosen = choose(run) if methods else []
    rows = {m: run.images(m, set(chosen)) for m in methods}
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
    """The cells of one sample: its reference, then every method's row, which is None if it failed."""
    cells = [{"image": reference["reference"], "alt": "The reference", "name": "reference", "line": None}]
    for method, row in rows.items():
        cell = {"name": named(method), "image": None, "alt": "", "line": None, "counted": counted}
        if row is not None:
            line = run.scores.get((method, row["id"]))
            cell |= {"image": row["image"], "alt": f"{named(method)}: {row['prompt']}", "line": line}
        cells.append(cell)
    return cells


def choose(run: Run) -> list[str]:
    """Samples to show: references evenly spaced over each split, difficulties in turn, the first seed."""
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
            lines_of = by_identity[identity]
            chosen.append(lines_of[place % len(lines_of)]["id"])
    return chosen


def learned(sheets: Sequence[tuple[int, Image]]) -> tuple[list[int], Image] | None:
    """Sample sheets as one image, and their steps: reference, target, then the student's images over the steps.

    A sheet has three columns, of which the last is the student's. At most `STEPS` sheets, evenly spaced, and the first
    lines are shown.
    """
    from PIL import Image

    if not sheets:
        return None
    spaced = [round(i * (len(sheets) - 1) / max(1, STEPS - 1)) for i in range(STEPS)]
    shown = [sheets[i] for i in dict.fromkeys(spaced)]
    last = shown[-1][1]
    panel, height = last.width // 3, min(last.height, LINES * last.width // 3)
    strip = Image.new("RGB", ((2 + len(shown)) * panel, height))
    strip.paste(last.crop((0, 0, 2 * panel, height)))
    for column, (_, sheet) in enumerate(shown, 2):
        strip.paste(sheet.crop((2 * panel, 0, 3 * panel, height)), (column * panel, 0))
    return [step for step, _ in shown], strip


def how(run: Run) -> str:
    """How to get scores that are missing."""
    none = run.recipe.evaluate.suite == "none"
    return "The recipe has no suite (evaluate.suite: none)." if none else "Run diptych evaluate."
