"""Draw, then score: every method on every sample of a suite, and `report/metrics.json`.

    evaluate(recipe, Path("runs/demo"))

Drawing resumes: each method's pictures are a data set of their own, `samples/METHOD/`, shard by shard through the
engine. Scoring is apart and reads only what was drawn: `samples/scores.jsonl` has one line for each picture, and the
metrics follow from those lines. A finished evaluation is recognised by its fingerprint and not done again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data import places, records
from diptych.data.engine import Engine, LocalEngine, Row, Work
from diptych.data.places import share
from diptych.data.store import Dataset, write_atomic
from diptych.errors import UsageError, UserError
from diptych.evaluate import suites
from diptych.evaluate.methods import drawn, named
from diptych.evaluate.methods.base import Context, Method
from diptych.evaluate.scoring import scores as scoring
from diptych.evaluate.scoring.scores import Judges
from diptych.evaluate.suites import Sample, Suite
from diptych.utils import models
from diptych.utils.machine import device_name, machine, peak, reset_peak, versions
from diptych.utils.paths import place

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe

DRAWING = 1  # raised when equal settings would give other pictures
SCORING = 3  # raised when equal pictures would get other numbers
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


def evaluate(
    recipe: Recipe,
    run_dir: Path,
    progress: Progress | None = None,
    suite: Suite | None = None,
    engine: Engine | None = None,
    source: Path | None = None,
) -> dict[str, Any]:
    """Draws what is missing, scores it, and returns (and writes) the metrics. On a cluster, one worker scores. Pictures
    that the run `source` has drawn by the same settings are taken over from it.

    Raises UsageError if the scoring judge is the one that curated, UserError if the run has no student yet or a model
    cannot be opened. A packaged student that is not installed is skipped, and the metrics say so.
    """
    run_dir = place(run_dir)
    engine = engine or LocalEngine()
    suite = suite or suites.load(recipe.evaluate.suite)
    refuse_one_judge(recipe)
    context = Context(recipe, run_dir, suite, source)
    samples = suite.samples(recipe.evaluate.samples, recipe.evaluate.prompts)
    methods, skipped = choose(context)
    prints = {name: fingerprint(recipe, suite, samples, method) for name, method in methods.items()}
    about = judges_about(recipe)
    candidates = Dataset(run_dir / "candidates")
    curated = candidates.manifest_hash() if candidates.manifest else None
    settings = recipe.fingerprint("task", "evaluate", "curate.thresholds")
    whole = _hash([SCORING, prints, about, skipped, curated, settings])
    if (found := finished(run_dir, whole)) is not None:
        return found
    run_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    generate(context, samples, methods, prints, engine, progress)
    result = engine.there("evaluate", judged, context, samples, list(methods), about)
    result |= {"skipped": skipped, "settings": recipe.evaluate.model_dump(mode="json")}
    result |= {"fingerprints": prints, "fingerprint": whole}
    result["seconds"] = round(time.monotonic() - started, 1)
    folder = run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "metrics.json", (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    return result


def judged(
    context: Context, samples: Sequence[Sample], methods: list[str], about: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """The scores of what was drawn, and where they were made."""
    use_threads(context.recipe)
    scores = scoring.score(context, samples, methods, load_judges(context.recipe, about))
    return {**scores, "machine": where(context.recipe), "versions": versions()}


def use_threads(recipe: Recipe) -> None:
    """Lets torch use as many CPU threads as the recipe says."""
    import torch

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)


def where(recipe: Recipe) -> dict[str, Any]:
    """The machine, and what of it this evaluation used."""
    import torch

    return machine() | {"threads": torch.get_num_threads(), "device": device_name(recipe.device)}


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


def fingerprint(recipe: Recipe, suite: Suite, samples: Sequence[Sample], method: Method) -> str:
    """What decides a method's pictures: suite, samples, weights and settings."""
    settings = recipe.evaluate
    drawing = [settings.steps, settings.image_guidance, settings.text_guidance, settings.true_guidance]
    drawing += [settings.batch_size, recipe.paint.guidance, recipe.paint.dtype, recipe.device, recipe.threads]
    drawing += [settings.null_panel] if settings.null_panel != "shared" else []
    return _hash([DRAWING, asked(suite, samples, settings.seeds), method.fingerprint(), drawing])


def asked(suite: Suite, samples: Sequence[Sample], seeds: Sequence[int]) -> str:
    """What decides a method's pictures apart from the method: sha256 over suite, samples and seeds."""
    # Samples are spelt out, not only named: a change of the world's drawing code or wording is a change of the suite.
    told = [asdict(sample) for sample in samples]
    return _hash([suite.fingerprint(), told, suite.picture(samples[0]).tobytes().hex(), list(seeds)])


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
        """Draws a batch."""
        use_threads(self.context.recipe)

        def work(rows: list[Row]) -> list[list[Row]]:
            samples = [self.samples[row["sample"]] for row in rows]
            references = [self.context.suite.picture(sample) for sample in samples]
            seeds = [suites.seed_of(row["sample"], row["seed"]) for row in rows]
            images = self.method.generate(references, samples, seeds)
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
    engine: Engine,
    progress: Progress | None = None,
) -> None:
    """Makes what is missing of `samples/METHOD/` for every method.

    What a batch took goes to the run's log, since it may not change the data's bytes.
    """
    settings = context.recipe.evaluate
    rows = [{"id": f"{s.id}-{seed}", "sample": s.id, "seed": seed} for s in samples for seed in settings.seeds]
    size = SHARD * settings.batch_size
    shards = [rows[start : start + size] for start in range(0, len(rows), size)]
    by_id = {sample.id: sample for sample in samples}
    subjects = list({(sample.split, sample.identity): sample for sample in samples}.values())
    total = len(rows) * len(methods)
    for number, (name, method) in enumerate(methods.items()):
        stage = _Drawing(name, method, context, by_id)
        folder = context.run_dir / "samples" / name
        output = Dataset(folder, records.schema(SAMPLE))
        if context.source is not None:
            take(context.source, context.run_dir, name, prints[name])
        failed = Dataset(context.run_dir / "failed" / "evaluate" / name, records.schema(records.FAILED))

        def report(done: int, _: int, *note: str, before: int = number * len(rows), name: str = name) -> None:
            if progress is not None:
                progress(before + done, total, ", ".join((name, *note)))

        def timed(images: int, seconds: float, name: str = name) -> None:
            took: dict[str, Any] = {"images": images, "seconds": round(seconds, 4)}
            if isinstance(engine, LocalEngine):  # else it is other processes that draw
                took["peak_bytes"] = peak(context.recipe.device)
            places.append(context.run_dir, "drawn", method=name, **took)

        made_by = {"suite": context.suite.name, "version": context.suite.version, "method": name}
        made_by["asked_sha256"] = asked(context.suite, samples, settings.seeds)
        if not output.is_complete(prints[name]):
            method.prepare([context.suite.picture(sample) for sample in subjects], subjects)
        reset_peak(context.recipe.device)
        engine.run(stage, shards, output, failed, prints[name], report, made_by, timed)


def take(source: Path, run_dir: Path, name: str, fingerprint: str) -> None:
    """A method's pictures that another run has drawn by the same settings, and what drawing them took there."""
    share(source / "failed" / "evaluate" / name, run_dir / "failed" / "evaluate" / name, fingerprint)
    if not share(source / "samples" / name, run_dir / "samples" / name, fingerprint):
        return

    def drawn(run: Path) -> list[dict[str, Any]]:
        return [each for each in places.read(run) if each.get("event") == "drawn" and each.get("method") == name]

    for took in drawn(source) if not drawn(run_dir) else ():
        places.append(
            run_dir, "drawn", **{key: took[key] for key in took.keys() - {"event", "time"}}, source=str(source)
        )


# ---- judges


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
