"""Relighting scored against the truth: the run's student, baselines and true renders, in `report/relight.json`.

    evaluate(recipe, Path("runs/pocket-relight"))

Every method gets the same samples (`suites.scenes`) and the same noise. Generation resumes: images are datasets,
`samples/relight/METHOD/`, made by `generation`. Each image is scored against the true relit image:

- `psnr` (decibels) and `ssim`, higher is better; `features`, a distance in the scoring judge's feature maps, lower is
  better;
- `structure`: how well the outlines agree with those of the reference at the same place, 0 to 1
  (`stages.curate.alignment`);
- `following`: the share of the requested changes (direction, color, strength) that the attribute reader finds;
- `relit`: structure × following of each image, the requested light *on the given scene*. A copy has the structure and
  an image from text alone has the light; neither has the product, as with CP·PF.

Scores are means with 95 % bootstrap intervals over scenes. A student's prompt is the light alone, as in `diptych
relight`, and its images get the reference's detail as there (`apps.relight`). `…_drawn` are the same images without
that detail, and the prompt of `…_told` also describes the scene. A student that was not trained to relight is scored
too.
"""

from __future__ import annotations

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
from diptych.evaluate import generation, harness, results
from diptych.evaluate.methods import available
from diptych.evaluate.methods.baselines import Copy, TextOnly
from diptych.evaluate.methods.common import Context, Method
from diptych.evaluate.methods.students import PackagedStudent, RunStudent
from diptych.evaluate.scoring import judging, metrics, truth
from diptych.evaluate.suites.scenes import LEVELS, ColorTransfer, RelightSample, Scenes
from diptych.recipe import tasks
from diptych.stages.curate import alignment
from diptych.stages.write import grammar
from diptych.utils.io import sha256_json
from diptych.utils.machine import versions
from diptych.utils.paths import place

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.recipe.schema import Recipe

FOLDER = "relight"  # in `samples/`
RESULT = "report/relight.json"
SCORES = ("psnr", "ssim", "features", "structure", "following", "relit")
BETTER_LOW = ("features",)
SHARES = ("structure", "following", "relit")  # from 0 to 1
HEADLINE = ("psnr", "ssim", "following", "relit")
BASELINES = ("copy", "colour_transfer", "colour_shift", "text_only")
STUDENTS = {"student": RunStudent, "student_shipped": PackagedStudent}
ROUND_TRIP = "truth_through_vae"
SCORING = 5  # raised when equal images would get other numbers


class Relit(Method):
    """A student that relights, from a prompt with or without a description of the scene."""

    def __init__(self, student: RunStudent, scene: bool) -> None:
        self.student, self.scene = student, scene
        self.task = tasks.load("relight")

    def prompt(self, sample: RelightSample) -> str:
        """The student's prompt for a sample."""
        return sample.prompt if self.scene else grammar.student_prompt(self.task, sample.light)

    @property
    def guidance(self) -> dict[str, Any]:
        """The recipe's guidance for relighting, where it differs from that for subjects."""
        return self.student.recipe.evaluate.relighting.model_dump(exclude_none=True)

    def fingerprint(self) -> str:
        guidance = f" {self.guidance}" if self.guidance else ""
        return f"{self.student.fingerprint()} {self.task.captions.instruction_templates[0]} {self.scene}{guidance}"

    def generate(self, references: Sequence[Image], samples: Sequence[Any], seeds: Sequence[int]) -> Sequence[Image]:
        prompted = [replace(s, prompt=self.prompt(s)) for s in samples]
        recipe, defaults = self.student.recipe.evaluate, self.student.pipeline().settings.relight
        unset = {name: value for name, value in defaults.items() if getattr(recipe, name) is None}
        return self.student.sample(references, prompted, seeds, unset | self.guidance)


def evaluate(
    recipe: Recipe,
    run_dir: Path,
    progress: generation.Progress | None = None,
    engine: Engine | None = None,
    source: Path | None = None,
) -> dict[str, Any]:
    """Generates and scores what is missing, writes the result and returns it; a finished one is returned as it is.

    Images that the run `source` generated with equal settings are shared. A packaged student that is not installed is
    skipped. UsageError if the scoring judge is the curating one. UserError if the run has no student, or if a model
    cannot be opened.
    """
    run_dir, suite = place(run_dir), Scenes()
    harness.refuse_curating_judge(recipe)
    samples = suite.samples(recipe.evaluate.relight)
    context = Context(recipe, run_dir, suite, source)  # pyright: ignore[reportArgumentType] (it has all that methods use)
    methods, skipped = choose_methods(context, suite)
    fingerprints = {name: generation.fingerprint(recipe, suite, samples, each) for name, each in methods.items()}  # pyright: ignore[reportArgumentType]
    judges = {role: about for role, about in harness.judge_fingerprints(recipe).items() if role != "curator"}
    whole = sha256_json([SCORING, DETAIL, fingerprints, judges, skipped, recipe.fingerprint("evaluate")])
    if (finished := results.find_json(run_dir / RESULT, whole)) is not None:
        return finished
    generation.use_threads(recipe)
    started = time.monotonic()
    generation.generate(context, samples, methods, fingerprints, engine or LocalEngine(), progress)
    models = judging.VisionModels(recipe.device)
    scorer, reader = models.judge(recipe.evaluate.scorer), models.reader(recipe.evaluate.reader)
    lines = score(run_dir, suite, samples, list(methods), scorer, reader, context.teacher().vae)
    results.write_scores(run_dir / "samples" / FOLDER / "scores.jsonl", lines)
    result = summary(lines, recipe.evaluate.bootstrap)
    result |= {"suite": suite.name, "version": suite.version, "scenes": recipe.evaluate.relight, "skipped": skipped}
    result |= {"seeds": list(recipe.evaluate.seeds), "detail": DETAIL, "judges": judges}
    result |= {"settings": recipe.evaluate.model_dump(mode="json"), "machine": harness.machine_used(recipe.device)}
    result |= {"versions": versions(), "fingerprints": fingerprints, "fingerprint": whole}
    result["seconds"] = round(time.monotonic() - started, 1)
    results.write_result(run_dir / RESULT, result)
    return result


def choose_methods(context: Context, suite: Scenes) -> tuple[dict[str, Method], dict[str, str]]:
    """The methods by name of their dataset; and the students that cannot run here, with the reason."""
    methods: dict[str, Method] = {
        f"{FOLDER}/copy": Copy(context),
        f"{FOLDER}/colour_transfer": ColorTransfer(suite, relative=False),
        f"{FOLDER}/colour_shift": ColorTransfer(suite, relative=True),
        f"{FOLDER}/text_only": TextOnly(context),
    }
    chosen = [name for name in context.recipe.evaluate.methods if name in STUDENTS]
    students, skipped = available({name: STUDENTS[name](context) for name in chosen})
    for name, student in students.items():
        methods[f"{FOLDER}/{name}"] = Relit(student, scene=False)
        methods[f"{FOLDER}/{name}_told"] = Relit(student, scene=True)
    return methods, skipped


# ---- scoring


def score(
    run_dir: Path,
    suite: Scenes,
    samples: Sequence[RelightSample],
    names: Sequence[str],
    scorer: Any,
    reader: Any,
    vae: Any,
) -> list[dict[str, Any]]:
    """A line of scores for each image of each method; students' images are scored with and without the detail."""
    from diptych.data.images import open_image

    by_id = {sample.id: sample for sample in samples}
    lines: list[dict[str, Any]] = []
    for name in names:
        short = name.removeprefix(f"{FOLDER}/")
        rows = list(Dataset(run_dir / "samples" / name))
        if not rows:
            raise UserError(
                "rows_failed", f"Every image of {short} failed. See failed/evaluate/{name} for the reasons."
            )
        of_rows = [by_id[row["sample"]] for row in rows]
        images = [open_image(row["image"]) for row in rows]
        if short.startswith("student"):
            detailed = [keep_detail(i, suite.reference_image(s), DETAIL) for i, s in zip(images, of_rows, strict=True)]
            lines += _lines(short, suite, of_rows, rows, detailed, scorer, reader)
            short = f"{short}_drawn"
        lines += _lines(short, suite, of_rows, rows, images, scorer, reader)
    trip = truth.round_trip(vae)([suite.truth(sample) for sample in samples])
    rows = [{"id": f"{sample.id}-0", "seed": 0} for sample in samples]
    return lines + _lines(ROUND_TRIP, suite, samples, rows, trip, scorer, reader)


def _lines(
    method: str,
    suite: Scenes,
    samples: Sequence[RelightSample],
    rows: Sequence[Any],
    images: Sequence[Image],
    scorer: Any,
    reader: Any,
) -> list[dict[str, Any]]:
    truths = [suite.truth(sample) for sample in samples]
    a, b = metrics.arrays(images), metrics.arrays(truths)
    near = {"psnr": metrics.psnr(a, b), "ssim": metrics.ssim(a, b)}
    near["features"] = metrics.feature_distance(scorer, images, truths)
    lines = []
    for number, (sample, row, reading) in enumerate(zip(samples, rows, reader.read(list(images)), strict=True)):
        met = metrics.following(sample.asked, reading.values)
        line = {"id": row["id"], "method": method, "scene": sample.identity, "level": sample.level, "seed": row["seed"]}
        line |= {key: round(float(values[number]), 5) for key, values in near.items()}
        kept, followed = structure(suite.reference_image(sample), images[number]), sum(met.values()) / len(met)
        line |= {"structure": round(kept, 5), "following": round(followed, 5), "relit": round(kept * followed, 5)}
        lines.append({**line, "met": met})
    return lines


def structure(reference: Image, output: Image) -> float:
    """How well outlines agree at the same place, 0 to 1; 0 if they agree better at another place."""
    from diptych.stages.curate.stage import ALIGNED_SHIFT

    shift = alignment.structural_shift(reference, output)
    return max(0.0, shift.match) if shift.shift <= ALIGNED_SHIFT else 0.0


def summary(lines: Sequence[dict[str, Any]], times: int) -> dict[str, Any]:
    """Means and intervals of each method, means by level, and every student compared with every baseline."""
    methods = {name: [x for x in lines if x["method"] == name] for name in dict.fromkeys(x["method"] for x in lines)}
    spread = {name: bootstrap(each, times) for name, each in methods.items()}
    scores = {name: _scores(each, spread[name]) for name, each in methods.items()}
    students, scenes = [name for name in methods if name.startswith("student")], len({x["scene"] for x in lines})
    return {
        "methods": {name: each for name, each in scores.items() if name != ROUND_TRIP},
        "anchors": {ROUND_TRIP: scores[ROUND_TRIP]},
        "levels": {
            name: {level: _means([x for x in each if x["level"] == level]) for level in LEVELS}
            for name, each in methods.items()
        },
        "comparisons": {
            student: {rival: _compare(spread, scores, student, rival, scenes) for rival in BASELINES}
            for student in students
        },
    }


def bootstrap(lines: Sequence[dict[str, Any]], times: int) -> dict[str, np.ndarray]:
    """Mean of each score in each resampling of the scenes, shape (times,)."""
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
        else:  # with few scenes, a score without bounds has no interval
            ci95[key] = metrics.interval(spread[key]) if count >= metrics.FEW else None
    return {**means, "ci95": ci95}


def _compare(
    spread: dict[str, dict[str, np.ndarray]], scores: dict[str, Any], student: str, rival: str, scenes: int
) -> dict[str, dict[str, Any]]:
    """A student minus a baseline on the same scenes. `ahead`: it is better, and the two intervals do not overlap."""
    compared = {}
    for key in SCORES:
        mine, theirs = scores[student]["ci95"][key], scores[rival]["ci95"][key]
        ahead = mine and theirs and (mine[1] < theirs[0] if key in BETTER_LOW else mine[0] > theirs[1])
        compared[key] = {
            "difference": round(scores[student][key] - scores[rival][key], 4),
            "ci95": metrics.interval(spread[student][key] - spread[rival][key]) if scenes >= metrics.FEW else None,
            "ahead": bool(ahead),
        }
    return compared
