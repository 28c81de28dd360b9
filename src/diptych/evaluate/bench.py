"""`diptych evaluate --suite`: models and baselines on a suite, drawn, scored, compared, and shown.

    evaluation = Evaluation(suite="pocket", models={"pocket": "pocket"}, baselines=["text_only", "copy"])
    evaluate(evaluation, Path("evaluations/first"))

Drawing and scoring both go on where they were killed, and can run apart (`only`): drawing needs the models, scoring
the pictures alone, which `OUT/samples/METHOD/` holds. A folder that is scored by another judge keeps its pictures.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diptych.data import places
from diptych.data.engine import Engine, LocalEngine
from diptych.data.store import Dataset, write_atomic
from diptych.errors import UsageError, UserError
from diptych.evaluate import config, run_suite
from diptych.evaluate.config import Evaluation
from diptych.evaluate.methods import gather, students
from diptych.evaluate.methods.base import Context, Method
from diptych.evaluate.scoring import judging, scorers, summary, truth
from diptych.evaluate.scoring.scorers import Scorer
from diptych.evaluate.scoring.scores import SAID
from diptych.evaluate.suites import Sample, Suite, pictures
from diptych.evaluate.suites.pictures import Pictures
from diptych.utils import models
from diptych.utils.console import Display, Report
from diptych.utils.machine import device_name, machine, versions

ANSWERS = "answers.sqlite"
POCKET_SIZE = (40, 5)  # references and prompts, where the suite has no end of its own
Only = Literal["generate", "score"]


@dataclass(frozen=True)
class Plan:
    """What is to be done: the suite, its samples, the methods by name, and the fingerprint of each one's pictures."""

    evaluation: Evaluation
    out: Path
    suite: Suite | Pictures
    samples: list[Sample]
    methods: dict[str, Method]
    prints: dict[str, str]
    context: Context


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

    UsageError for an evaluation that cannot be, a judge that curated a model's data (unless `force`), or a folder whose
    pictures other settings made; UserError for a model that cannot be opened, or pictures that are not there yet.
    """
    display = display or Display(quiet=True)
    if not evaluation.models and not evaluation.baselines:
        raise UsageError("nothing to evaluate: name a --model, a --baseline, or both")
    evaluation = settled(evaluation, out)
    suite = suite or pictures.open_suite(evaluation.suite, evaluation.data, evaluation.size)
    scorers_ = [] if only == "generate" else choose(evaluation, suite, out)
    identities = {scorer.name: scorer.identity() for scorer in scorers_}
    known = students.curators_of(evaluation, out)
    judge = own_weights(evaluation, suite) if scorers_ else ("", frozenset())
    forced = students.refuse_own_judge(known, *judge, force) if scorers_ else False
    plan = make_plan(evaluation, suite, out, only)
    out.mkdir(parents=True, exist_ok=True)
    students.remember(known, evaluation, out)
    write_atomic(out / config.FILE, config.dump(evaluation))
    if evaluation.threads is not None:
        import torch

        torch.set_num_threads(evaluation.threads)
    if only != "score":
        with display.stage("generate", "pictures") as report:
            run_suite.generate(plan.context, plan.samples, plan.methods, plan.prints, engine or LocalEngine(), report)
    if only == "generate":
        return {"out": str(out), "drawn": {name: len(Dataset(out / "samples" / name)) for name in plan.methods}}
    with display.stage("score", "pictures") as report:
        lines = look(plan, scorers_, report)
    result = summary.summarise(plan.evaluation, plan.suite, plan.samples, lines, list(plan.methods))
    speed, memory = drawing_costs(out)
    for name, found in result["methods"].items():
        found |= {"seconds_per_image": speed.get(name), "peak_memory_bytes": memory.get(name)}
    summary.add_costs(result, plan.evaluation, lines)
    curated = {name: None if by is None else [c.name for c in by] for name, by in known.items()}
    result |= {"judges": identities | {"curated_by": curated, "forced": forced}}
    result |= {
        "settings": evaluation.model_dump(mode="json"),
        "seeds": list(evaluation.seeds),
        "machine": where(evaluation.device),
    }
    result |= {"versions": versions(), "fingerprints": plan.prints}
    (out / "report").mkdir(exist_ok=True)
    text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomic(out / "report" / "metrics.json", text.encode())
    return result


def settled(asked: Evaluation, out: Path) -> Evaluation:
    """The evaluation with its device: its folder's, else this machine's. Scoring elsewhere needs no such device."""
    if asked.device != "auto":
        return asked
    kept = config.read(out).get("device", "auto")
    if kept == "auto":
        from diptych.utils.machine import pick_device

        kept = str(pick_device("auto"))
    return asked.model_copy(update={"device": kept})


def where(device: str) -> dict[str, Any]:
    """The machine, and what of it was used."""
    import torch

    return machine() | {"threads": torch.get_num_threads(), "device": device_name(device)}


def make_plan(evaluation: Evaluation, suite: Suite | Pictures, out: Path, only: Only | None = None) -> Plan:
    """Everything but the work. UserError for weights that are not there, unless there is nothing to draw with them."""
    context = Context(evaluation.recipe(), out, suite)  # pyright: ignore[reportArgumentType]
    most = POCKET_SIZE if isinstance(suite, Suite) else (None, None)
    samples = suite.samples(evaluation.references or most[0], evaluation.prompts or most[1])  # pyright: ignore[reportArgumentType]
    methods = gather(evaluation, context, isinstance(suite, Suite))
    if only == "score":
        prints = drawn(out, list(methods), run_suite.asked(suite, samples, evaluation.seeds))  # pyright: ignore[reportArgumentType]
    else:
        recipe = context.recipe
        prints = {name: run_suite.fingerprint(recipe, suite, samples, m) for name, m in methods.items()}  # pyright: ignore[reportArgumentType]
    return Plan(evaluation, out, suite, samples, methods, prints, context)


def drawn(out: Path, names: Sequence[str], asked: str) -> dict[str, str]:
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


# ---- scoring


def choose(evaluation: Evaluation, suite: Suite | Pictures, out: Path) -> list[Scorer]:
    """The scorers: judge, copies, similarity metrics, diversity. UsageError for a judge that does not fit."""
    kind, judge = evaluation.judge_kind(), evaluation.judge
    models = judging.Models(evaluation.device)
    found: list[Scorer] = []
    if kind == "vlm":
        found.append(vlm(evaluation, out))
    elif kind == "pocket":
        if isinstance(suite, Pictures):
            raise UsageError("the pocket judge knows the pocket world alone; judge pictures with vlm or embedding")
        found.append(judging.PocketJudge(suite, judge.scorer or config.POCKET, judge.reader, models))
    elif isinstance(suite, Pictures):
        found.append(judging.EmbeddingJudge(suite, judge.scorer or config.METRICS["dinov2"], judge.text, models))
    else:
        raise UsageError("the embedding judge is for suites of pictures; the pocket suite has judges of its own")
    if kind != "pocket":
        found.append(copies(suite))
    default = () if isinstance(suite, Suite) else suite.spec.metrics
    asked = evaluation.metric_models(default)
    found += [judging.Similarity(name, model, models) for name, model in asked.items()]
    if len(evaluation.seeds) > 1:
        usual = config.POCKET if isinstance(suite, Suite) else config.METRICS["dinov2"]
        eyes = judge.scorer or next((m for n, m in asked.items() if n != "clip-t"), usual)
        found.append(judging.Diversity(eyes, models))
    return found


def vlm(evaluation: Evaluation, out: Path) -> Scorer:
    """The vision-language judge, its answers kept in the folder."""
    from diptych.evaluate.scoring.scorers import VlmScorer
    from diptych.llm.client import open_model

    judge = evaluation.judge
    about: dict[str, Any] = {"model": str(judge.model), "sampling": judge.asked.sampling() if judge.asked else {}}

    def open_judge() -> Any:
        return open_model(judge.endpoint, judge.local, judge.vllm, cache=out / ANSWERS, device=evaluation.device)

    return VlmScorer(open_judge, about, judge.repeats, judge.debiased)


def copies(suite: Suite | Pictures) -> Scorer:
    """What finds copies: below the nearest 1 % of true re-renders, or, for pictures, below the suite's distance."""
    if isinstance(suite, Pictures):
        limit = suite.spec.copy_distance
        about = {"kind": "copy", "copy_distance": limit}
        return scorers.CopyScorer(lambda: dict.fromkeys(("identities", "kinds"), limit), about)
    return scorers.CopyScorer(lambda: truth.copy_thresholds(suite), {"kind": "copy", "suite": suite.fingerprint()})


def own_weights(evaluation: Evaluation, suite: Suite | Pictures) -> tuple[str, frozenset[str]]:
    """The judge's name and the sha256 of its weights; a vision-language model goes by its name."""

    judge = evaluation.judge
    kind = evaluation.judge_kind()
    if kind == "vlm":
        return judge.model or "", frozenset()
    name = judge.scorer or (config.POCKET if kind == "pocket" else config.METRICS["dinov2"])
    return name, models.weights(models.resolve(name, "scorer"))


def look(plan: Plan, scorers_: Sequence[Scorer], progress: Report) -> list[dict[str, Any]]:
    """Every scorer at every method's pictures; one line for each picture, which `samples/scores.jsonl` holds."""
    done = 0
    columns = [*SAID, "sample", "prompt"]
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in plan.methods:
        data = Dataset(plan.out / "samples" / name)
        data.verify()  # scores that are there already are not read again, and the report shows every picture
        rows[name] = data.columns(*columns)
        if not rows[name]:
            raise UserError(f"{name}: every picture failed; see {plan.out / 'failed' / 'evaluate' / name}")
    total = len(scorers_) * sum(len(own) for own in rows.values())

    lines: list[dict[str, Any]] = []
    for name, own in rows.items():
        values: dict[str, dict[str, Any]] = {row["id"]: {} for row in own}
        for scorer in scorers_:

            def report(more: int, note: str = f"{name}: {scorer.name}") -> None:
                nonlocal done
                done += more
                progress(done, total, note)

            for id, found in scorers.score(plan.out, name, scorer, plan.prints[name], report).items():
                values[id] |= found
        lines += [{**row, **values[row["id"]]} for row in own]
    text = "".join(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(plan.out / "samples" / "scores.jsonl", text.encode())
    return lines


def drawing_costs(out: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Of each method: median seconds a picture over batches, and the most memory that a batch took."""
    spent: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for event in places.read(out):
        if event.get("event") == "drawn" and event["images"]:
            spent.setdefault(event["method"], []).append(event["seconds"] / event["images"])
            if event.get("peak_bytes"):
                peaks[event["method"]] = max(peaks.get(event["method"], 0), event["peak_bytes"])
    return {name: round(statistics.median(values), 5) for name, values in spent.items()}, peaks


def lines(found: dict[str, Any]) -> list[str]:
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
