"""Evaluation: draw what is missing, score it, and write `report/metrics.json`.

    evaluation = Evaluation(suite="pocket", models={"pocket": "pocket"}, baselines=["text_only", "copy"])
    evaluate(evaluation, Path("evaluations/first"))       # `diptych evaluate --suite`
    evaluate_run(recipe, Path("runs/demo"))               # the last stage of a run

Both go the same way: a plan (samples, methods, fingerprints), `drawing.generate`, `look`, `summary.summarize`. Drawing
needs the models, scoring the pictures alone, so `only` does one of them. Each resumes where it was killed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diptych.data.engine import Engine, LocalEngine
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.evaluate import drawing, suites
from diptych.evaluate.drawing import Progress, use_threads
from diptych.evaluate.evaluation import FILE, Evaluation, dump, read
from diptych.evaluate.methods import drawn, gather, named, students
from diptych.evaluate.methods.common import Context, Method
from diptych.evaluate.scoring import judging, summary, truth
from diptych.evaluate.scoring.scorers import Scorer, file_of, score
from diptych.evaluate.suites import MAIN, Sample, Suite, pictures
from diptych.evaluate.suites.pictures import Pictures
from diptych.utils import models
from diptych.utils.console import Display, Report
from diptych.utils.io import sha256_json, write_atomic
from diptych.utils.machine import device_name, machine, pick_device, versions
from diptych.utils.paths import place

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe

SCORING = 3  # raised when equal pictures would get other numbers
POCKET_SIZE = (40, 5)  # references and prompts, where the suite has no end of its own
SAID = ("id", "method", "split", "identity", "kind", "level", "seed")  # of a picture, in its line of scores
Only = Literal["generate", "score"]


@dataclass(frozen=True)
class EvaluationPlan:
    """What is to be drawn and scored: samples, the methods by name, and the fingerprint of each one's pictures."""

    evaluation: Evaluation
    context: Context
    samples: list[Sample]
    methods: dict[str, Method]
    prints: dict[str, str]

    def generate(self, engine: Engine | None, progress: Progress | None) -> None:
        """Draws what is missing."""
        drawing.generate(self.context, self.samples, self.methods, self.prints, engine or LocalEngine(), progress)

    def summarize(self, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The metrics of scored lines."""
        found = summary.summarize(self.evaluation, self.context.suite, self.samples, lines, list(self.methods))
        summary.add_speed(found, self.context.run_dir)
        return found


def make_plan(
    evaluation: Evaluation, context: Context, methods: dict[str, Method], only: Only | None = None
) -> EvaluationPlan:
    """Everything but the work. UserError for weights that are not there, unless there is nothing to draw with them."""
    suite: Any = context.suite
    most = POCKET_SIZE if isinstance(context.suite, Suite) else (None, None)
    samples = suite.samples(evaluation.references or most[0], evaluation.prompts or most[1])
    if only == "score":
        prints = prints_of(context.run_dir, list(methods), drawing.asked(suite, samples, evaluation.seeds))
    else:
        prints = {name: drawing.fingerprint(context.recipe, suite, samples, m) for name, m in methods.items()}
    return EvaluationPlan(evaluation, context, samples, methods, prints)


def prints_of(out: Path, names: Sequence[str], asked: str) -> dict[str, str]:
    """The fingerprints of pictures that are there, by method. UserError if they are not, or of other samples."""
    found = {}
    for name in names:
        data = Dataset(out / "samples" / name)
        manifest = data.manifest or {}
        if manifest.get("asked_sha256") != asked or not data.is_complete():
            whose = "for other samples, seeds or references" if manifest else "by nobody yet, or not to its end"
            raise UserError(f"{data.url} was drawn {whose}; draw it first, without --only score")
        found[name] = manifest["fingerprint"]
    return found


def look(plan: EvaluationPlan, scorers: Sequence[Scorer], progress: Report | None = None) -> list[dict[str, Any]]:
    """Every scorer at every method's pictures; one line for each picture, which `samples/scores.jsonl` holds.

    With `progress`, what a scorer has seen is also kept in `scores/METHOD/SCORER.jsonl`, so that scoring resumes.
    """
    done, out = 0, plan.context.run_dir
    columns = SAID if progress is None else (*SAID, "sample", "prompt")
    sets = {name: Dataset(out / "samples" / name) for name in plan.methods}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, data in sets.items():
        data.verify()  # scores that are there already are not read again, and the report shows every picture
        rows[name] = data.columns(*columns)
        if not rows[name]:
            raise UserError(f"{name}: every picture failed; see {out / 'failed' / 'evaluate' / name}")
    total = len(scorers) * sum(len(own) for own in rows.values())

    lines: list[dict[str, Any]] = []
    for name, own in rows.items():
        values: dict[str, dict[str, Any]] = {row["id"]: {} for row in own}
        for scorer in scorers:

            def report(more: int, note: str = f"{name}: {scorer.name}") -> None:
                nonlocal done
                done += more
                if progress is not None:
                    progress(done, total, note)

            file = None if progress is None else file_of(out, name, scorer, plan.prints[name])
            for id, found in score(sets[name], scorer, file, report).items():
                values[id] |= found
        lines += [{**row, **values[row["id"]]} for row in own]
    text = "".join(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(out / "samples" / "scores.jsonl", text.encode())
    return lines


def write_metrics(out: Path, result: dict[str, Any]) -> None:
    """Writes `report/metrics.json`."""
    (out / "report").mkdir(exist_ok=True)
    text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomic(out / "report" / "metrics.json", text.encode())


def where(device: str) -> dict[str, Any]:
    """The machine, and what of it was used."""
    import torch

    return machine() | {"threads": torch.get_num_threads(), "device": device_name(device)}


# ---- models and baselines on a suite


def evaluate(
    evaluation: Evaluation,
    out: Path,
    only: Only | None = None,
    force: bool = False,
    display: Display | None = None,
    suite: Suite | Pictures | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Draws what is missing, scores what is missing, and returns (and writes) the metrics; with `only="generate"` what
    was drawn.

    UsageError for an evaluation that cannot be, a judge that curated a model's data (unless `force`), or a folder
    whose pictures other settings made; UserError for a model that cannot be opened, or pictures that are not there yet.
    """
    display = display or Display(quiet=True)
    if not evaluation.models and not evaluation.baselines:
        raise UsageError("nothing to evaluate: name a --model, a --baseline, or both")
    evaluation = settled(evaluation, out)
    suite = suite or pictures.open_suite(evaluation.suite, evaluation.data, evaluation.size)
    scorers = [] if only == "generate" else judging.choose(evaluation, suite, out)
    identities = {scorer.name: scorer.identity() for scorer in scorers}
    known = students.curators_of(evaluation, out)
    forced = students.refuse_own_judge(known, *judging.weights(evaluation), force) if scorers else False
    context = Context(evaluation.recipe(), out, suite)  # pyright: ignore[reportArgumentType]
    plan = make_plan(evaluation, context, gather(evaluation, context, isinstance(suite, Suite)), only)
    out.mkdir(parents=True, exist_ok=True)
    students.remember(known, evaluation, out)
    write_atomic(out / FILE, dump(evaluation))
    use_threads(context.recipe)
    if only != "score":
        with display.stage("generate", "pictures") as report:
            plan.generate(engine, report)
    if only == "generate":
        return {"out": str(out), "drawn": {name: len(Dataset(out / "samples" / name)) for name in plan.methods}}
    with display.stage("score", "pictures") as report:
        lines = look(plan, scorers, report)
    result = plan.summarize(lines)
    summary.add_details(result, evaluation, lines, out)
    curated = {name: None if by is None else [c.name for c in by] for name, by in known.items()}
    result |= {"judges": identities | {"curated_by": curated, "forced": forced}}
    result |= {"settings": evaluation.model_dump(mode="json"), "machine": where(evaluation.device)}
    result |= {"versions": versions(), "fingerprints": plan.prints}
    write_metrics(out, result)
    return result


def settled(asked: Evaluation, out: Path) -> Evaluation:
    """The evaluation with its device: its folder's, else this machine's. Scoring elsewhere needs no such device."""
    if asked.device != "auto":
        return asked
    kept = read(out).get("device", "auto")
    return asked.model_copy(update={"device": str(pick_device("auto")) if kept == "auto" else kept})


def format_result(found: dict[str, Any]) -> list[str]:
    """What an evaluation has to say on a terminal."""
    if "methods" not in found:
        return [f"{name}: {count} pictures" for name, count in found["drawn"].items()]
    width = max(len(name) for name in [*found["methods"], *found["anchors"], "method"])
    told = [f"{'method':<{width}}   CP     PF     CP·PF  95 %           copies"]
    for name, s in {**found["methods"], **found["anchors"]}.items():
        low, high = s["ci95"]["cp_pf"]
        scores = "  ".join(f"{s[key]:.3f}" for key in ("cp", "pf", "cp_pf"))
        told.append(f"{name:<{width}}  {scores}  {low:.3f}–{high:.3f}  {100 * s['copy_rate']:5.1f} %")
    return told


# ---- the last stage of a run


def evaluate_run(
    recipe: Recipe,
    run_dir: Path,
    progress: Progress | None = None,
    suite: Suite | None = None,
    engine: Engine | None = None,
    source: Path | None = None,
) -> dict[str, Any]:
    """Draws what is missing, scores it, and returns (and writes) the metrics. On a cluster, one worker scores. Pictures
    that the run `source` has drawn by the same settings are taken over from it. A finished evaluation is recognized by
    its fingerprint and returned as it is.

    Raises UsageError if the scoring judge is the one that curated, UserError if the run has no student yet or a model
    cannot be opened. A packaged student that is not installed is skipped, and the metrics say so.
    """
    run_dir, engine = place(run_dir), engine or LocalEngine()
    suite = suite or suites.load(recipe.evaluate.suite)
    refuse_one_judge(recipe)
    context = Context(recipe, run_dir, suite, source)
    methods, skipped = choose(context)
    plan = make_plan(Evaluation.of_run(recipe, run_dir), context, methods)
    about = judges_about(recipe)
    candidates = Dataset(run_dir / "candidates")
    curated = candidates.manifest_hash() if candidates.manifest else None
    settings = recipe.fingerprint("task", "evaluate", "curate.thresholds")
    whole = sha256_json([SCORING, plan.prints, about, skipped, curated, settings])
    if (found := finished(run_dir, whole)) is not None:
        return found
    run_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    plan.generate(engine, progress)
    result = engine.there("evaluate", score_run, plan, about)
    result |= {"skipped": skipped, "settings": recipe.evaluate.model_dump(mode="json")}
    result |= {"fingerprints": plan.prints, "fingerprint": whole}
    result["seconds"] = round(time.monotonic() - started, 1)
    write_metrics(run_dir, result)
    return result


def score_run(plan: EvaluationPlan, about: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The scores of what was drawn, how far its judges can be trusted, and where they were made."""
    recipe = plan.context.recipe
    use_threads(recipe)
    opened = judging.VisionModels(recipe.device)
    judge = judging.pocket(plan.evaluation, plan.context.suite, opened)
    result = plan.summarize(look(plan, [judge]))
    result |= {"prompts": recipe.evaluate.prompts}
    result["calibration"] = {s: {k: round(v, 5) for k, v in asdict(x).items()} for s, x in judge.scales.items()}
    if recipe.evaluate.yardsticks:
        limit = judge.scales[MAIN].copy_distance
        result |= {"copy_rate_of_renders": truth.copy_rate(plan.context.suite, limit)}
        result |= truth.yardsticks(plan.context, opened, about)
    else:
        result["judges"] = about
    return {**result, "machine": where(recipe.device), "versions": versions()}


def finished(run_dir: Path, whole: str) -> dict[str, Any] | None:
    """The metrics of an evaluation that these very settings, weights and suite made before; None otherwise."""
    try:
        found = json.loads((run_dir / "report" / "metrics.json").read_text("utf8"))
    except (OSError, ValueError):
        return None
    return found if found.get("fingerprint") == whole else None


def refuse_one_judge(recipe: Recipe) -> None:
    """UsageError if any weights file of the scoring judge is also one of the curating judge."""
    curator = models.resolve(recipe.curate.judge, "curator")
    scorer = models.resolve(recipe.evaluate.scorer, "scorer")
    if models.weights(curator) & models.weights(scorer):
        raise UsageError(
            f"evaluate.scorer ({recipe.evaluate.scorer}) is the judge that curated the data (curate.judge: "
            f"{recipe.curate.judge}): a student is not scored by the judge that chose what it learnt from; "
            "choose another evaluate.scorer"
        )


def choose(context: Context) -> tuple[dict[str, Method], dict[str, str]]:
    """The recipe's methods and the anchors; and the methods that cannot run here, with the reason."""
    methods: dict[str, Method] = {}
    skipped: dict[str, str] = {}
    asked = drawn(context.recipe.evaluate)
    for name, method in ((own, method) for each in asked for own, method in named(each, context).items()):
        try:
            method.fingerprint()
        except UserError as error:
            if name != "student_shipped":
                raise
            skipped[name] = str(error)
            continue
        methods[name] = method
    return methods, skipped


def judges_about(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Name and fingerprint of each judge."""
    names = {"scorer": recipe.evaluate.scorer, "curator": recipe.curate.judge, "reader": recipe.evaluate.reader}
    return {
        role: {"name": name, "fingerprint": models.fingerprint(models.resolve(name, role))}
        for role, name in names.items()
    }
