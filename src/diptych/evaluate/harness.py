"""Evaluation: generate the missing images, score them, and write `report/metrics.json`.

    evaluation = Evaluation(suite="pocket", models={"pocket": "pocket"}, baselines=["text_only", "copy"])
    evaluate(evaluation, Path("evaluations/first"))       # `diptych evaluate --suite`
    evaluate_run(recipe, Path("runs/demo"))               # the last stage of a run

Both use the same steps: a plan (samples, methods, fingerprints), `generation.generate`, `score_images` and
`summary.summarize`. Generation needs the models, scoring only the images, so `only` can select one of them. Each
resumes where it was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diptych.data.engine import Engine, LocalEngine
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.evaluate import generation, results, suites
from diptych.evaluate.evaluation import FILE, Evaluation, dump, read
from diptych.evaluate.generation import Progress, use_threads
from diptych.evaluate.methods import available, build, method_names, of_evaluation, students
from diptych.evaluate.methods.common import Context, Method
from diptych.evaluate.scoring import judging, quality, summary, truth
from diptych.evaluate.scoring.scorers import Scorer, score, score_file
from diptych.evaluate.suites import MAIN, Sample, Suite, images
from diptych.evaluate.suites.images import ImageSuite
from diptych.utils import models
from diptych.utils.console import Display, Report
from diptych.utils.io import sha256_json, write_atomic
from diptych.utils.machine import device_name, machine, pick_device, versions
from diptych.utils.paths import place

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe

SCORING = 4  # raised when equal images would get other numbers
POCKET_SIZE = (40, 5)  # references and prompts of the pocket suite, which could give any number
COPIED = ("id", "method", "split", "identity", "kind", "level", "seed")  # columns of an image in its line of scores
Only = Literal["generate", "score"]


@dataclass(frozen=True)
class EvaluationPlan:
    """The work of an evaluation: samples, methods by name, and the fingerprint of each method's images."""

    evaluation: Evaluation
    context: Context
    samples: list[Sample]
    methods: dict[str, Method]
    fingerprints: dict[str, str]

    def generate(self, engine: Engine | None, progress: Progress | None) -> None:
        """Generates the missing images."""
        engine = engine or LocalEngine()
        generation.generate(self.context, self.samples, self.methods, self.fingerprints, engine, progress)

    def summarize(self, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns the metrics of scored lines."""
        result = summary.summarize(self.evaluation, self.context.suite, self.samples, lines, list(self.methods))
        summary.add_speed(result, self.context.run_dir)
        return result


def make_plan(
    evaluation: Evaluation, context: Context, methods: dict[str, Method], only: Only | None = None
) -> EvaluationPlan:
    """Returns the plan of an evaluation. UserError for missing weights, or, with `only="score"`, for missing images."""
    suite: Any = context.suite
    default = POCKET_SIZE if isinstance(context.suite, Suite) else (None, None)
    samples = suite.samples(evaluation.references or default[0], evaluation.prompts or default[1])
    if only == "score":
        wanted = generation.samples_fingerprint(suite, samples, evaluation.seeds)
        fingerprints = {name: existing_fingerprint(context.run_dir / "samples" / name, wanted) for name in methods}
    else:
        fingerprints = {n: generation.fingerprint(context.recipe, suite, samples, m) for n, m in methods.items()}
    return EvaluationPlan(evaluation, context, samples, methods, fingerprints)


def existing_fingerprint(folder: Path, samples: str) -> str:
    """The fingerprint of a method's generated images. UserError if they are incomplete or of other samples."""
    data = Dataset(folder)
    manifest = data.manifest or {}
    if manifest.get("asked_sha256") != samples or not data.is_complete():
        fault = "are of other samples, seeds or references" if manifest else "are missing or incomplete"
        raise UserError("run_incomplete", f"The images in {data.url} {fault}. Run without --only score to generate.")
    return manifest["fingerprint"]


def score_images(
    plan: EvaluationPlan, scorers: Sequence[Scorer], progress: Report | None = None
) -> list[dict[str, Any]]:
    """Runs every scorer on every method's images. Returns the lines of `samples/scores.jsonl`, one for each image.

    With `progress`, values are also stored in `scores/METHOD/SCORER.jsonl`, so that scoring resumes.
    """
    done, out = 0, plan.context.run_dir
    columns = COPIED if progress is None else (*COPIED, "sample", "prompt")
    sets = {name: Dataset(out / "samples" / name) for name in plan.methods}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, data in sets.items():
        data.verify()  # images with stored scores are not read again, but the report shows them
        rows[name] = data.columns(*columns)
        if not rows[name]:
            raise UserError(
                "rows_failed",
                f"Every image of {name} failed. See {out / 'failed' / 'evaluate' / name} for the reasons.",
            )
    total = len(scorers) * sum(len(each) for each in rows.values())

    lines: list[dict[str, Any]] = []
    for name, each in rows.items():
        values: dict[str, dict[str, Any]] = {row["id"]: {} for row in each}
        for scorer in scorers:

            def report(more: int, note: str = f"{name}: {scorer.name}") -> None:
                nonlocal done
                done += more
                if progress is not None:
                    progress(done, total, note)

            file = None if progress is None else score_file(out, name, scorer, plan.fingerprints[name])
            for id, scored in score(sets[name], scorer, file, report).items():
                values[id] |= scored
        lines += [{**row, **values[row["id"]]} for row in each]
    results.write_scores(out / results.SCORES, lines)
    return lines


def machine_used(device: str) -> dict[str, Any]:
    """The machine, with the device and the number of threads in use."""
    import torch

    return machine() | {"threads": torch.get_num_threads(), "device": device_name(device)}


# ---- models and baselines on a suite


def evaluate(
    evaluation: Evaluation,
    out: Path,
    only: Only | None = None,
    force: bool = False,
    display: Display | None = None,
    suite: Suite | ImageSuite | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Generates and scores what is missing, writes the metrics and returns them.

    With `only="generate"` it returns the number of images by method. UsageError for settings that contradict each
    other, a judge that curated a model's data (unless `force`), or a folder of images made by other settings. UserError
    for a model that cannot be opened, or for missing images.
    """
    display = display or Display(quiet=True)
    if not evaluation.models and not evaluation.baselines:
        raise UsageError("option_missing", "Nothing to evaluate. Pass --model, --baseline, or both.")
    evaluation = resolve_device(evaluation, out)
    suite = suite or images.open_suite(evaluation.suite, evaluation.data, evaluation.size)
    scorers = [] if only == "generate" else judging.choose(evaluation, suite, out)
    identities = {scorer.name: scorer.identity() for scorer in scorers}
    curators = students.curators_of(evaluation, out)
    forced = students.refuse_curator(curators, *judging.weights(evaluation), force) if scorers else False
    context = Context(evaluation.recipe(), out, suite)  # pyright: ignore[reportArgumentType]
    plan = make_plan(evaluation, context, of_evaluation(evaluation, context, isinstance(suite, Suite)), only)
    students.write_curators(curators, evaluation, out)
    write_atomic(out / FILE, dump(evaluation))
    use_threads(context.recipe)
    if only != "score":
        with display.stage("generate", "images") as report:
            plan.generate(engine, report)
    if only == "generate":
        return {"out": str(out), "drawn": {name: len(Dataset(out / "samples" / name)) for name in plan.methods}}
    with display.stage("score", "images") as report:
        lines = score_images(plan, scorers, report)
    result = plan.summarize(lines)
    summary.add_details(result, evaluation, lines, out)
    for scorer in scorers:
        if isinstance(scorer, (judging.PocketScorer, judging.EmbeddingScorer)):
            quality.add_kernel_distances(result, out, scorer.features, scorer.like)
    names = {name: None if by is None else [c.name for c in by] for name, by in curators.items()}
    result |= {"judges": identities | {"curated_by": names, "forced": forced}}
    result |= {"settings": evaluation.model_dump(mode="json"), "machine": machine_used(evaluation.device)}
    result |= {"versions": versions(), "fingerprints": plan.fingerprints}
    results.write_result(out / results.METRICS, result)
    return result


def resolve_device(evaluation: Evaluation, out: Path) -> Evaluation:
    """The evaluation with `device: auto` resolved: the device stored in its folder, else the best of this machine.

    Scoring on another machine does not need the stored device.
    """
    if evaluation.device != "auto":
        return evaluation
    stored = read(out).get("device", "auto")
    return evaluation.model_copy(update={"device": str(pick_device("auto")) if stored == "auto" else stored})


def format_result(result: dict[str, Any]) -> list[str]:
    """The lines that the command line prints for a result of `evaluate`."""
    if "methods" not in result:
        return [f"{name}: {count} images" for name, count in result["drawn"].items()]
    everyone = {**result["methods"], **result["anchors"]}
    width = max(len(name) for name in [*everyone, "method"])
    lines = [f"{'method':<{width}}   CP     PF     CP·PF  95 %           copies"]
    for name, s in everyone.items():
        low, high = s["ci95"]["cp_pf"]
        scores = "  ".join(f"{s[key]:.3f}" for key in ("cp", "pf", "cp_pf"))
        lines.append(f"{name:<{width}}  {scores}  {low:.3f}–{high:.3f}  {100 * s['copy_rate']:5.1f} %")
    return lines


# ---- the last stage of a run


def evaluate_run(
    recipe: Recipe,
    run_dir: Path,
    progress: Progress | None = None,
    suite: Suite | None = None,
    engine: Engine | None = None,
    source: Path | None = None,
) -> dict[str, Any]:
    """Generates and scores what is missing, writes the metrics and returns them.

    On a cluster, one worker scores. Images that the run `source` generated with equal settings are shared. A finished
    evaluation is recognized by its fingerprint and returned as it is. A packaged student that is not installed is
    skipped and listed in the metrics.

    UsageError if the scoring judge is the curating one. UserError if the run has no student, or if a model cannot be
    opened.
    """
    run_dir, engine = place(run_dir), engine or LocalEngine()
    suite = suite or suites.load(recipe.evaluate.suite)
    refuse_curating_judge(recipe)
    context = Context(recipe, run_dir, suite, source)
    named = [build(name, context) for name in method_names(recipe.evaluate)]
    methods, skipped = available({name: method for each in named for name, method in each.items()})
    plan = make_plan(Evaluation.of_run(recipe, run_dir), context, methods)
    judges = judge_fingerprints(recipe)
    candidates = Dataset(run_dir / "candidates")
    curated = candidates.manifest_hash() if candidates.manifest else None
    settings = recipe.fingerprint("task", "evaluate", "curate.thresholds")
    whole = sha256_json([SCORING, plan.fingerprints, judges, skipped, curated, settings])
    if (finished := results.find_json(run_dir / results.METRICS, whole)) is not None:
        return finished
    run_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    plan.generate(engine, progress)
    result = engine.there("evaluate", score_run, plan, judges)
    result |= {"skipped": skipped, "settings": recipe.evaluate.model_dump(mode="json")}
    result |= {"fingerprints": plan.fingerprints, "fingerprint": whole}
    result["seconds"] = round(time.monotonic() - started, 1)
    results.write_result(run_dir / results.METRICS, result)
    return result


def score_run(plan: EvaluationPlan, judges: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The metrics of a run's images, the errors of its judges, and the machine that scored."""
    recipe = plan.context.recipe
    use_threads(recipe)
    opened = judging.VisionModels(recipe.device)
    judge = judging.pocket(plan.evaluation, plan.context.suite, opened)
    result = plan.summarize(score_images(plan, [judge]))
    quality.add_kernel_distances(result, plan.context.run_dir, judge.features, judge.like)
    result |= {"prompts": recipe.evaluate.prompts}
    result["calibration"] = {s: {k: round(v, 5) for k, v in asdict(x).items()} for s, x in judge.scales.items()}
    if recipe.evaluate.yardsticks:
        limit = judge.scales[MAIN].copy_distance
        result |= {"copy_rate_of_renders": truth.copy_rate(plan.context.suite, limit)}
        result |= truth.yardsticks(plan.context, opened, judges)
    else:
        result["judges"] = judges
    return {**result, "machine": machine_used(recipe.device), "versions": versions()}


def refuse_curating_judge(recipe: Recipe) -> None:
    """UsageError if the scoring judge and the curating judge share a weights file."""
    curator = models.resolve(recipe.curate.judge, "curator")
    scorer = models.resolve(recipe.evaluate.scorer, "scorer")
    if models.weights(curator) & models.weights(scorer):
        raise UsageError(
            "judge_conflict",
            f"evaluate.scorer ({recipe.evaluate.scorer}) is the judge that curated the pairs (curate.judge: "
            f"{recipe.curate.judge}). Scores of a student need a judge that did not choose its training data. "
            "Choose another evaluate.scorer.",
        )


def judge_fingerprints(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Name and fingerprint of each judge, by role."""
    names = {"scorer": recipe.evaluate.scorer, "curator": recipe.curate.judge, "reader": recipe.evaluate.reader}
    return {
        role: {"name": name, "fingerprint": models.fingerprint(models.resolve(name, role))}
        for role, name in names.items()
    }
