"""Relighting against the truth: the run's student, baselines and the renderer's own answer, and `report/relight.json`.

    evaluate(recipe, Path("runs/pocket-relight"))

Every method answers the same wishes (`suites.scenes`) with the same noise. Drawing resumes: pictures are data sets,
`samples/relight/METHOD/`, made by `drawing`. What is scored, picture by picture, against the true relit one:

- `psnr` (decibels) and `ssim`, higher is nearer; `features`, a distance in the scoring judge's feature maps, lower is;
- `structure`: how well the outlines lie where the reference has them, 0 to 1 (`stages.curate.alignment`);
- `following`: the share of what the words change (direction, colour, strength) that the attribute reader finds;
- `relit`: structure × following of each picture, the light as asked *on the scene that was given*. A copy keeps the one
  and a new picture from the text alone has the other; neither has the product, as with CP·PF.

Means with 95 % bootstrap intervals over scenes. A student is asked for the light alone, as `diptych relight` asks, and
scored as that command draws (`apps.relight`); `…_drawn` are the same pictures without the reference's detail,
and `…_told` was also told what the scene is. A student that never learnt to relight runs, and scores what it scores.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.apps.relight import DETAIL, keep_detail
from diptych.data.engine import Engine, LocalEngine
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.evaluate import drawing, harness
from diptych.evaluate.methods.baselines import Copy, TextOnly
from diptych.evaluate.methods.common import Context, Method
from diptych.evaluate.methods.students import RunStudent, StudentShipped
from diptych.evaluate.scoring import judging, metrics, truth
from diptych.evaluate.suites.scenes import LEVELS, ColourTransfer, Scenes, Wish
from diptych.recipe import tasks
from diptych.stages.curate import alignment
from diptych.stages.write import grammar
from diptych.utils.io import sha256_json, write_atomic
from diptych.utils.machine import versions
from diptych.utils.paths import place

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.recipe.schema import Recipe

FOLDER = "relight"  # in `samples/`
SCORES = ("psnr", "ssim", "features", "structure", "following", "relit")
BETTER_LOW = ("features",)
SHARES = ("structure", "following", "relit")  # from 0 to 1
HEADLINE = ("psnr", "ssim", "following", "relit")
BASELINES = ("copy", "colour_transfer", "colour_shift", "text_only")
STUDENTS = {"student": RunStudent, "student_shipped": StudentShipped}
ROUND_TRIP = "truth_through_vae"
SCORING = 5  # raised when equal pictures would get other numbers


class Relit(Method):
    """A student, asked for a light: told what the scene is, or not."""

    def __init__(self, student: RunStudent, told: bool) -> None:
        self.student, self.told = student, told
        self.task = tasks.load("relight")

    def words(self, sample: Wish) -> str:
        """What the student reads."""
        return sample.prompt if self.told else grammar.student_prompt(self.task, sample.light)

    @property
    def guided(self) -> dict[str, Any]:
        """Where guidance is another than for subjects."""
        return self.student.recipe.evaluate.relighting.model_dump(exclude_none=True)

    def fingerprint(self) -> str:
        guided = f" {self.guided}" if self.guided else ""
        return f"{self.student.fingerprint()} {self.task.captions.instruction_templates[0]} {self.told}{guided}"

    def generate(self, references: Sequence[Image], samples: Sequence[Any], seeds: Sequence[int]) -> Sequence[Image]:
        told = [replace(s, prompt=self.words(s)) for s in samples]
        asked, own = self.student.recipe.evaluate, self.student.opened().settings.relight
        unset = {name: value for name, value in own.items() if getattr(asked, name) is None}
        return self.student.drawn(references, told, seeds, unset | self.guided)


def evaluate(
    recipe: Recipe,
    run_dir: Path,
    progress: drawing.Progress | None = None,
    engine: Engine | None = None,
    source: Path | None = None,
) -> dict[str, Any]:
    """Draws what is missing, scores it, and returns (and writes) the result; a finished one is returned as it is.
    Pictures that the run `source` has drawn by the same settings are taken over from it.

    UsageError if the scoring judge is the one that curated, UserError if the run has no student yet or a model cannot
    be opened. A packaged student that is not installed is skipped.
    """
    run_dir, suite = place(run_dir), Scenes()
    harness.refuse_one_judge(recipe)
    wishes = suite.samples(recipe.evaluate.relight)
    context = Context(recipe, run_dir, suite, source)  # pyright: ignore[reportArgumentType] (it gives what methods ask for)
    methods, skipped = choose(context, suite)
    prints = {name: drawing.fingerprint(recipe, suite, wishes, method) for name, method in methods.items()}  # pyright: ignore[reportArgumentType]
    about = {role: known for role, known in harness.judges_about(recipe).items() if role != "curator"}
    decided = [SCORING, DETAIL, prints, about, skipped, recipe.fingerprint("evaluate")]
    whole = sha256_json(decided)
    path = run_dir / "report" / "relight.json"
    if (found := read(path)) is not None and found.get("fingerprint") == whole:
        return found
    drawing.use_threads(recipe)
    started = time.monotonic()
    drawing.generate(context, wishes, methods, prints, engine or LocalEngine(), progress)
    judges = judging.VisionModels(recipe.device)
    scorer, reader = judges.judge(recipe.evaluate.scorer), judges.reader(recipe.evaluate.reader)
    lines = score(run_dir, suite, wishes, list(methods), scorer, reader, context.teacher().vae)
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_atomic(run_dir / "samples" / FOLDER / "scores.jsonl", text.encode())
    result = summary(lines, recipe.evaluate.bootstrap)
    result |= {"suite": suite.name, "version": suite.version, "scenes": recipe.evaluate.relight, "skipped": skipped}
    result |= {"seeds": list(recipe.evaluate.seeds), "detail": DETAIL, "judges": about}
    result |= {"settings": recipe.evaluate.model_dump(mode="json"), "machine": harness.where(recipe.device)}
    result |= {"versions": versions(), "fingerprints": prints, "fingerprint": whole}
    result["seconds"] = round(time.monotonic() - started, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    return result


def read(path: Path) -> dict[str, Any] | None:
    """A result that was written before; None if there is none."""
    try:
        return json.loads(path.read_text("utf8"))
    except (OSError, ValueError):
        return None


def choose(context: Context, suite: Scenes) -> tuple[dict[str, Method], dict[str, str]]:
    """What draws, by the name of its data set; and the students that cannot, with the reason."""
    methods: dict[str, Method] = {
        f"{FOLDER}/copy": Copy(context),
        f"{FOLDER}/colour_transfer": ColourTransfer(suite, relative=False),
        f"{FOLDER}/colour_shift": ColourTransfer(suite, relative=True),
        f"{FOLDER}/text_only": TextOnly(context),
    }
    skipped: dict[str, str] = {}
    for name in context.recipe.evaluate.methods:
        if name not in STUDENTS:
            continue
        student = STUDENTS[name](context)
        try:
            student.fingerprint()
        except UserError as error:
            if name != "student_shipped":
                raise
            skipped[name] = str(error)
            continue
        for told in (False, True):
            methods[f"{FOLDER}/{name}{'_told' if told else ''}"] = Relit(student, told)
    return methods, skipped


# ---- scoring


def score(
    run_dir: Path, suite: Scenes, wishes: Sequence[Wish], names: Sequence[str], scorer: Any, reader: Any, vae: Any
) -> list[dict[str, Any]]:
    """One line for each picture of each method, those of students with and without the reference's detail."""
    from diptych.data.images import open_image

    by_id = {wish.id: wish for wish in wishes}
    lines: list[dict[str, Any]] = []
    for name in names:
        short = name.removeprefix(f"{FOLDER}/")
        rows = list(Dataset(run_dir / "samples" / name))
        if not rows:
            raise UserError(f"{short}: every picture failed; see failed/evaluate/{name}")
        own = [by_id[row["sample"]] for row in rows]
        drawn = [open_image(row["image"]) for row in rows]
        if short.startswith("student"):
            detailed = [keep_detail(image, suite.picture(wish), DETAIL) for image, wish in zip(drawn, own, strict=True)]
            lines += _lines(short, suite, own, rows, detailed, scorer, reader)
            short = f"{short}_drawn"
        lines += _lines(short, suite, own, rows, drawn, scorer, reader)
    trip = truth.round_trip(vae)([suite.truth(wish) for wish in wishes])
    rows = [{"id": f"{wish.id}-0", "seed": 0} for wish in wishes]
    return lines + _lines(ROUND_TRIP, suite, list(wishes), rows, trip, scorer, reader)


def _lines(
    method: str,
    suite: Scenes,
    wishes: Sequence[Wish],
    rows: Sequence[Any],
    images: Sequence[Image],
    scorer: Any,
    reader: Any,
) -> list[dict[str, Any]]:
    truths = [suite.truth(wish) for wish in wishes]
    a, b = metrics.arrays(images), metrics.arrays(truths)
    near = {"psnr": metrics.psnr(a, b), "ssim": metrics.ssim(a, b)}
    near["features"] = metrics.feature_distance(scorer, images, truths)
    found = []
    for number, (wish, row, reading) in enumerate(zip(wishes, rows, reader.read(list(images)), strict=True)):
        met = metrics.following(wish.asked, reading.values)
        line = {"id": row["id"], "method": method, "scene": wish.identity, "level": wish.level, "seed": row["seed"]}
        line |= {key: round(float(values[number]), 5) for key, values in near.items()}
        kept, followed = structure(suite.picture(wish), images[number]), sum(met.values()) / len(met)
        line |= {"structure": round(kept, 5), "following": round(followed, 5), "relit": round(kept * followed, 5)}
        found.append({**line, "met": met})
    return found


def structure(reference: Image, output: Image) -> float:
    """How well outlines agree where they are, 0 to 1; 0 if they agree better somewhere else."""
    from diptych.stages.curate.stage import ALIGNED_SHIFT

    seen = alignment.structural_shift(reference, output)
    return max(0.0, seen.match) if seen.shift <= ALIGNED_SHIFT else 0.0


def summary(lines: Sequence[dict[str, Any]], times: int) -> dict[str, Any]:
    """Means and intervals of each method, by level, and every student against every baseline."""
    methods = {name: [x for x in lines if x["method"] == name] for name in dict.fromkeys(x["method"] for x in lines)}
    spread = {name: bootstrap(own, times) for name, own in methods.items()}
    told = {name: _scores(own, spread[name]) for name, own in methods.items()}
    levels = {
        name: {level: _means([x for x in own if x["level"] == level]) for level in LEVELS}
        for name, own in methods.items()
    }
    students, scenes = [name for name in methods if name.startswith("student")], len({x["scene"] for x in lines})
    return {
        "methods": {name: found for name, found in told.items() if name != ROUND_TRIP},
        "anchors": {ROUND_TRIP: told[ROUND_TRIP]},
        "levels": levels,
        "comparisons": {
            student: {rival: _against(spread, told, student, rival, scenes) for rival in BASELINES}
            for student in students
        },
    }


def bootstrap(lines: Sequence[dict[str, Any]], times: int) -> dict[str, np.ndarray]:
    """Each score's mean in each resampling of the scenes, (times,)."""
    scenes = np.array([x["scene"] for x in lines])
    draws = metrics.resample(scenes, times)
    return {key: metrics.resampled_mean(scenes, np.array([x[key] for x in lines]), draws) for key in SCORES}


def _means(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {key: round(float(np.mean([x[key] for x in lines])), 4) for key in SCORES} | {"n": len(lines)}


def _scores(lines: Sequence[dict[str, Any]], spread: dict[str, np.ndarray]) -> dict[str, Any]:
    means, scenes = _means(lines), np.array([x["scene"] for x in lines])
    ci95: dict[str, list[float] | None] = {}
    count = len(np.unique(scenes))
    for key in SCORES:
        resamples = metrics.resamples(scenes, np.array([x[key] for x in lines]))
        if key in SHARES and not resamples:
            ci95[key] = metrics.bounded(means[key], count, (0.0, 1.0))
        else:  # of a few scenes a score without bounds has no interval
            ci95[key] = metrics.interval(spread[key]) if count >= metrics.FEW else None
    return {**means, "ci95": ci95}


def _against(
    spread: dict[str, dict[str, np.ndarray]], told: dict[str, Any], student: str, rival: str, scenes: int
) -> dict[str, dict[str, Any]]:
    """A student minus a baseline on the same scenes, and whether it is better with intervals that do not meet."""
    found = {}
    for key in SCORES:
        sign = -1 if key in BETTER_LOW else 1
        mine, theirs = told[student]["ci95"][key], told[rival]["ci95"][key]
        ahead = mine and theirs and (mine[0] > theirs[1] if sign == 1 else mine[1] < theirs[0])
        found[key] = {
            "difference": round(told[student][key] - told[rival][key], 4),
            "ci95": metrics.interval(spread[student][key] - spread[rival][key]) if scenes >= metrics.FEW else None,
            "ahead": bool(ahead),
        }
    return found
