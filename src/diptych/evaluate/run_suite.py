"""Draw, then score: every method on every sample of a suite, and `report/metrics.json`.

    evaluate(recipe, Path("runs/demo"))

Drawing resumes: each method's pictures are a data set of their own, `samples/METHOD/`, shard by shard through the
engine. Scoring is apart and reads only what was drawn: `samples/scores.jsonl` has one line for each picture, and the
metrics follow from those lines. A finished evaluation is recognised by its fingerprint and not done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych import __version__, models
from diptych.data import log, records
from diptych.data.engine import LocalEngine, Row, Work
from diptych.data.store import Dataset, write_atomic
from diptych.errors import UsageError, UserError
from diptych.evaluate import curation, metrics, suites, truth
from diptych.evaluate.baselines import ANCHORS, METHODS, Context, Method, open_teacher
from diptych.evaluate.suites import MAIN, Sample, Suite

if TYPE_CHECKING:
    from diptych.recipe import Recipe

VERSION = 1  # of the scores: raised when equal pictures would get other numbers
STUDENTS = ("student", "student_shipped")
SHARD = 2  # batches
SAMPLE = {
    "image": records.IMAGE,
    "reference": records.IMAGE,
    "prompt": "string",
    "id": "string",
    "sample": "string",
    "method": "string",
    "split": "string",
    "identity": "int64",
    "kind": "string",
    "level": "string",
    "asked": "string",  # JSON: attribute group → value
    "seed": "int64",
}
Progress = Callable[..., None]  # (images done, images in all, note="")


@dataclass
class Judges:
    """The three models that look at pictures, and how they are known."""

    scorer: Any
    curator: Any
    reader: Any
    about: dict[str, dict[str, str]]  # role → {"name", "fingerprint"}


def evaluate(
    recipe: Recipe, run_dir: Path, progress: Progress | None = None, suite: Suite | None = None
) -> dict[str, Any]:
    """Draws what is missing, scores it, and returns (and writes) the metrics.

    Raises UsageError if the scoring judge is the one that curated, UserError if the run has no student yet or a model
    cannot be opened. A packaged student that is not installed is skipped, and the metrics say so.
    """
    run_dir = Path(run_dir)
    suite = suite or suites.load(recipe.evaluate.suite)
    refuse_one_judge(recipe)
    context = Context(recipe, run_dir, suite)
    samples = suite.samples(recipe.evaluate.samples, recipe.evaluate.prompts)
    methods, skipped = choose(context)
    prints = {name: fingerprint(recipe, suite, samples, method) for name, method in methods.items()}
    about = judges_about(recipe)
    whole = _hash([VERSION, prints, about, skipped, recipe.fingerprint("evaluate", "curate.thresholds")])
    if (found := finished(run_dir, whole)) is not None:
        return found
    started = time.monotonic()
    generate(context, samples, methods, prints, progress)
    judges = load_judges(recipe, about)
    result = score(context, samples, list(methods), judges)
    result |= {"skipped": skipped, "settings": recipe.evaluate.model_dump(mode="json"), "machine": machine(recipe)}
    result |= {"versions": versions(), "fingerprints": prints, "fingerprint": whole}
    result["seconds"] = round(time.monotonic() - started, 1)
    folder = run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "metrics.json", (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    return result


def finished(run_dir: Path, whole: str) -> dict[str, Any] | None:
    """The metrics of an evaluation that these very settings, weights and suite made before; None otherwise."""
    try:
        found = json.loads((run_dir / "report" / "metrics.json").read_text("utf8"))
    except (OSError, ValueError):
        return None
    return found if found.get("fingerprint") == whole else None


# ---- what is compared


def refuse_one_judge(recipe: Recipe) -> None:
    """UsageError if any weights file of the scoring judge is also one of the curating judge."""
    curator = models.resolve(recipe.curate.judge, "curator")
    scorer = models.resolve(recipe.evaluate.scorer, "scorer")
    if _weights(curator) & _weights(scorer):
        raise UsageError(
            f"evaluate.scorer ({recipe.evaluate.scorer}) is the judge that curated the data (curate.judge: "
            f"{recipe.curate.judge}): a student is not scored by the judge that chose what it learnt from; "
            "choose another evaluate.scorer"
        )


def _weights(path: Path) -> set[str]:
    """sha256 of each weights file, wherever it lies and whatever it is called."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".bin"))
    hashes = set()
    for file in files:
        with file.open("rb") as stream:
            hashes.add(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashes or {models.fingerprint(path)}


def choose(context: Context) -> tuple[dict[str, Method], dict[str, str]]:
    """The recipe's methods and the anchors; and the methods that cannot run here, with the reason."""
    methods: dict[str, Method] = {}
    skipped: dict[str, str] = {}
    for name in dict.fromkeys([*context.recipe.evaluate.methods, *ANCHORS]):
        method = METHODS[name](context)
        try:
            method.fingerprint()
        except UserError as error:
            if name != "student_shipped":
                raise
            skipped[name] = str(error)
            continue
        methods[name] = method
    return methods, skipped


def fingerprint(recipe: Recipe, suite: Suite, samples: Sequence[Sample], method: Method) -> str:
    """What decides a method's pictures: suite, samples, weights and settings."""
    settings = recipe.evaluate
    drawing = [settings.steps, settings.image_guidance, settings.text_guidance, settings.true_guidance]
    drawing += [settings.batch_size, recipe.paint.guidance, recipe.paint.dtype, recipe.device, recipe.threads]
    # Samples are spelt out, not only named: a change of the world's drawing code or wording is a change of the suite.
    asked = [asdict(sample) for sample in samples]
    first = suite.picture(samples[0]).tobytes().hex()
    return _hash([VERSION, suite.fingerprint(), asked, first, settings.seeds, method.fingerprint(), drawing])


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ---- drawing


class _Drawing:
    """A method as a stage: sample rows in, pictures out."""

    def __init__(self, name: str, method: Method, context: Context, samples: dict[str, Sample]) -> None:
        self.name = name
        self.method = method
        self.context = context
        self.samples = samples
        self.batch_size = context.recipe.evaluate.batch_size

    def load(self) -> Work:
        """Draws a batch; its time goes to the run's log, since it may not change the data's bytes."""

        def work(rows: list[Row]) -> list[list[Row]]:
            samples = [self.samples[row["sample"]] for row in rows]
            references = [self.context.suite.picture(sample) for sample in samples]
            seeds = [suites.seed_of(row["sample"], row["seed"]) for row in rows]
            started = time.perf_counter()
            images = self.method.generate(references, samples, seeds)
            seconds = time.perf_counter() - started
            log.append(self.context.run_dir, "drawn", method=self.name, images=len(rows), seconds=round(seconds, 4))
            return [
                [self._row(row, sample, reference, image)]
                for row, sample, reference, image in zip(rows, samples, references, images, strict=True)
            ]

        return work

    def _row(self, row: Row, sample: Sample, reference: Any, image: Any) -> Row:
        from diptych.data.images import image_cell

        return {
            "image": image_cell(image),
            "reference": image_cell(reference),
            "prompt": sample.prompt,
            "id": row["id"],
            "sample": sample.id,
            "method": self.name,
            "split": sample.split,
            "identity": sample.identity,
            "kind": sample.kind,
            "level": sample.level,
            "asked": json.dumps(sample.asked),
            "seed": row["seed"],
        }


def generate(
    context: Context,
    samples: Sequence[Sample],
    methods: dict[str, Method],
    prints: dict[str, str],
    progress: Progress | None = None,
) -> None:
    """Makes what is missing of `samples/METHOD/` for every method."""
    settings = context.recipe.evaluate
    rows = [{"id": f"{s.id}-{seed}", "sample": s.id, "seed": seed} for s in samples for seed in settings.seeds]
    size = SHARD * settings.batch_size
    shards = [rows[start : start + size] for start in range(0, len(rows), size)]
    by_id = {sample.id: sample for sample in samples}
    total = len(rows) * len(methods)
    for number, (name, method) in enumerate(methods.items()):
        stage = _Drawing(name, method, context, by_id)
        folder = context.run_dir / "samples" / name
        output = Dataset(folder, records.schema(SAMPLE))
        failed = Dataset(context.run_dir / "failed" / "evaluate" / name, records.schema(records.FAILED))

        def report(done: int, _: int, before: int = number * len(rows), note: str = name) -> None:
            if progress is not None:
                progress(before + done, total, note)

        made_by = {"suite": context.suite.name, "version": context.suite.version, "method": name}
        LocalEngine().run(stage, shards, output, failed, prints[name], report, made_by)


# ---- scoring


def judges_about(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Name and fingerprint of each judge."""
    names = {"scorer": recipe.evaluate.scorer, "curator": recipe.curate.judge, "reader": recipe.evaluate.reader}
    return {
        role: {"name": name, "fingerprint": models.fingerprint(models.resolve(name, role))}
        for role, name in names.items()
    }


def load_judges(recipe: Recipe, about: dict[str, dict[str, str]]) -> Judges:
    """Opens scorer, curator and reader."""
    from diptych.judges.attributes import AttributeReader
    from diptych.judges.embedding import EmbeddingJudge

    device = recipe.device
    return Judges(
        scorer=EmbeddingJudge.load(recipe.evaluate.scorer, role="scorer", device=device),
        curator=EmbeddingJudge.load(recipe.curate.judge, role="curator", device=device),
        reader=AttributeReader.load(recipe.evaluate.reader, device=device),
        about=about,
    )


def score(context: Context, samples: Sequence[Sample], names: Sequence[str], judges: Judges) -> dict[str, Any]:
    """Scores the pictures in `samples/`, writes `samples/scores.jsonl`, and returns the metrics."""
    recipe, suite, run_dir = context.recipe, context.suite, context.run_dir
    times = recipe.evaluate.bootstrap
    embed = judges.scorer.embed
    scales = {split: truth.scale(suite, split, embed) for split in suite.splits}
    lines: list[dict[str, Any]] = []
    for name in names:
        lines += score_method(run_dir, name, scales, embed, judges.reader.read)
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_atomic(run_dir / "samples" / "scores.jsonl", text.encode())

    methods = [name for name in names if name not in ANCHORS]
    outcomes = {split: {name: outcome(lines, name, split) for name in names} for split in suite.splits}
    summaries = {
        split: {name: metrics.summary(found, times) for name, found in by.items()} for split, by in outcomes.items()
    }
    speed = seconds_per_image(run_dir)
    for by in summaries.values():
        for name in methods:
            by[name]["seconds_per_image"] = speed.get(name)
    result: dict[str, Any] = {
        "suite": suite.name,
        "version": suite.version,
        "methods": {name: summaries[MAIN][name] for name in methods},
        "anchors": {name: summaries[MAIN][name] for name in ANCHORS if name in summaries[MAIN]},
        "seeds": list(recipe.evaluate.seeds),
        "identities": len({sample.identity for sample in samples if sample.split == MAIN}),
        "prompts": recipe.evaluate.prompts,
        "splits": {
            split: {
                "methods": {name: by[name] for name in methods},
                "anchors": {name: by[name] for name in ANCHORS if name in by},
            }
            for split, by in summaries.items()
            if split != MAIN
        },
        "levels": {name: grouped(lines, name, "level") for name in names},
        "attributes": {name: attribute_rates(lines, name) for name in names},
        "comparisons": comparisons(outcomes[MAIN], times),
        "calibration": {split: {k: round(v, 5) for k, v in asdict(scale).items()} for split, scale in scales.items()},
    }
    return result | judged(context, judges, scales[MAIN])


def score_method(
    run_dir: Path, name: str, scales: dict[Any, metrics.Scale], embed: curation.Embed, read: truth.Read
) -> list[dict[str, Any]]:
    """One line for each picture of a method."""
    from diptych.data.images import open_image

    lines: list[dict[str, Any]] = []
    pictures = Dataset(run_dir / "samples" / name)
    for shard in pictures.shards():
        rows = pictures.read_shard(shard)
        if not rows:
            continue
        images = [open_image(row["image"]) for row in rows]
        references = [open_image(row["reference"]) for row in rows]
        similarity = curation.similarities(references, images, embed)
        distances = metrics.copy_distances(references, images)
        for row, alike, distance, reading in zip(rows, similarity, distances, read(images), strict=True):
            scale, asked = scales[row["split"]], json.loads(row["asked"])
            met = metrics.following(asked, reading.values)
            lines.append(
                {
                    **{key: row[key] for key in ("id", "method", "split", "identity", "kind", "level", "seed")},
                    "similarity": round(float(alike), 5),
                    "cp": round(float(scale.concept(np.array([alike]))[0]), 5),
                    "pf": round(sum(met.values()) / len(met), 5),
                    "copy_distance": round(float(distance), 5),
                    "copied": bool(distance < scale.copy_distance),
                    "asked": asked,
                    "read": {group: reading.values.get(group) for group in asked},
                    "met": met,
                }
            )
    return lines


def outcome(lines: Sequence[dict[str, Any]], name: str, split: str) -> metrics.Outcome:
    """The arrays of one method on one split. UserError if it has no picture there."""
    own = sorted((x for x in lines if x["method"] == name and x["split"] == split), key=lambda x: x["id"])
    if not own:
        raise UserError(f"{name}: every picture of the split '{split}' failed; see failed/evaluate/{name}")
    columns = ([x[key] for x in own] for key in ("identity", "cp", "pf", "copied"))
    return metrics.Outcome(*(np.array(column) for column in columns))


def grouped(lines: Sequence[dict[str, Any]], name: str, key: str) -> dict[str, dict[str, float]]:
    """Mean scores of a method on the main split by level or kind."""
    own = [x for x in lines if x["method"] == name and x["split"] == MAIN]
    result = {}
    for value in dict.fromkeys(x[key] for x in own):
        part = outcome([x for x in own if x[key] == value], name, MAIN)
        result[value] = {k: round(v, 4) for k, v in part.means().items()} | {"n": len(part.cp)}
    return result


def attribute_rates(lines: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """How often each asked attribute was found in a method's pictures of the main split."""
    hits: dict[str, list[bool]] = {}
    for line in lines:
        if line["method"] == name and line["split"] == MAIN:
            for group, met in line["met"].items():
                hits.setdefault(group, []).append(met)
    return {group: round(float(np.mean(met)), 4) for group, met in hits.items()}


def comparisons(outcomes: dict[str, metrics.Outcome], times: int) -> dict[str, dict[str, Any]]:
    """Each student against each other method, paired: `{"student": {"inpaint": {…}}}`."""
    result: dict[str, dict[str, Any]] = {}
    for student in STUDENTS:
        if student in outcomes:
            rivals = [name for name in outcomes if name != student and name not in ANCHORS]
            pairable = [n for n in rivals if np.array_equal(outcomes[n].identity, outcomes[student].identity)]
            result[student] = {n: metrics.compare(outcomes[student], outcomes[n], times) for n in pairable}
    return result


def judged(context: Context, judges: Judges, scale: metrics.Scale) -> dict[str, Any]:
    """The judges' own errors on renders, and what they say about curation."""
    suite = context.suite
    through = truth.round_trip(context.opened("vae", lambda: open_teacher(context.recipe)).vae)
    about: dict[str, dict[str, Any]] = {role: dict(known) for role, known in judges.about.items()}
    about["scorer"]["auc"] = truth.judge_auc(suite, judges.scorer.embed)
    about["curator"]["auc"] = truth.judge_auc(suite, judges.curator.embed)
    about["reader"]["accuracy"] = truth.reader_accuracy(suite, judges.reader.read)
    about["reader"]["accuracy_through_vae"] = truth.reader_accuracy(suite, judges.reader.read, through)
    pairs = truth.check_pairs(suite, through)

    def identify(images: Sequence[Any]) -> np.ndarray:
        return np.stack([reading.identity for reading in judges.reader.read(list(images))])

    witness = curation.witness(pairs, identify)
    curated = curation.on_renders(pairs, judges.curator.embed, context.recipe.curate.thresholds)
    return {
        "copy_rate_of_renders": truth.copy_rate(suite, scale.copy_distance),
        "judges": about,
        "curation": {"renders": curated, "grids": curation.on_grids(context.run_dir, identify, witness)},
    }


# ---- circumstances


def seconds_per_image(run_dir: Path) -> dict[str, float]:
    """Median over batches, from the log: what a picture took while drawing them in batches."""
    spent: dict[str, list[float]] = {}
    for event in log.read(run_dir):
        if event.get("event") == "drawn" and event["images"]:
            spent.setdefault(event["method"], []).append(event["seconds"] / event["images"])
    return {name: round(statistics.median(values), 5) for name, values in spent.items()}


def machine(recipe: Recipe) -> dict[str, Any]:
    """Where this ran."""
    import torch

    cuda = recipe.device.startswith("cuda") and torch.cuda.is_available()
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else recipe.device,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """The installed versions of what the numbers depend on."""
    found = {"diptych": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
