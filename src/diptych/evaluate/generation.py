"""Generation: every method answers every sample of a suite, and each method's images are a dataset, `samples/METHOD/`.

Images are generated shard by shard through the engine, so a killed evaluation resumes. The fingerprint of a dataset
covers suite, samples, weights and settings. The time and memory of each batch go to the run's log.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data import places, records
from diptych.data.engine import Engine, LocalEngine, Row, Work
from diptych.data.places import share
from diptych.data.store import Dataset
from diptych.evaluate import suites
from diptych.evaluate.methods.common import Context, Method
from diptych.evaluate.suites import Sample, Suite
from diptych.utils.io import sha256_json
from diptych.utils.machine import peak, reset_peak

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe

VERSION = 1  # raised when equal settings would give other images
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


def use_threads(recipe: Recipe) -> None:
    """Limits torch to the CPU threads that the recipe sets."""
    import torch

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)


def fingerprint(recipe: Recipe, suite: Suite, samples: Sequence[Sample], method: Method) -> str:
    """Fingerprint of a method's images: sha256 over suite, samples, weights and settings."""
    settings = recipe.evaluate
    values = [settings.steps, settings.image_guidance, settings.text_guidance, settings.true_guidance]
    values += [settings.batch_size, recipe.paint.guidance, recipe.paint.dtype, recipe.device, recipe.threads]
    values += [settings.null_panel] if settings.null_panel != "shared" else []
    return sha256_json([VERSION, samples_fingerprint(suite, samples, settings.seeds), method.fingerprint(), values])


def samples_fingerprint(suite: Suite, samples: Sequence[Sample], seeds: Sequence[int]) -> str:
    """Fingerprint of what every method gets: sha256 over suite, samples and seeds."""
    # Whole samples, not only their names: a change of the renderer or of the wording changes the suite.
    contents = [asdict(sample) for sample in samples]
    first = suite.reference_image(samples[0]).tobytes().hex()
    return sha256_json([suite.fingerprint(), contents, first, list(seeds)])


class _Generation:
    """A method as a stage: sample rows in, images out."""

    def __init__(self, name: str, method: Method, context: Context, samples: dict[str, Sample]) -> None:
        self.name = name
        self.method = method
        self.context = context
        self.samples = samples
        self.batch_size = context.recipe.evaluate.batch_size

    def load(self) -> Work:
        """Returns a function that generates a batch."""
        use_threads(self.context.recipe)

        def work(rows: list[Row]) -> list[list[Row]]:
            samples = [self.samples[row["sample"]] for row in rows]
            references = [self.context.suite.reference_image(sample) for sample in samples]
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
    fingerprints: dict[str, str],
    engine: Engine,
    progress: Progress | None = None,
) -> None:
    """Generates the missing images of `samples/METHOD/` for every method.

    Time and memory of each batch go to the run's log, because they must not change the bytes of the data.
    """
    settings = context.recipe.evaluate
    rows = [{"id": f"{s.id}-{seed}", "sample": s.id, "seed": seed} for s in samples for seed in settings.seeds]
    size = SHARD * settings.batch_size
    shards = [rows[start : start + size] for start in range(0, len(rows), size)]
    by_id = {sample.id: sample for sample in samples}
    subjects = list({(sample.split, sample.identity): sample for sample in samples}.values())
    total = len(rows) * len(methods)
    for number, (name, method) in enumerate(methods.items()):
        output = Dataset(context.run_dir / "samples" / name, records.schema(SAMPLE))
        if context.source is not None:
            take(context.source, context.run_dir, name, fingerprints[name])
        failed = Dataset(context.run_dir / "failed" / "evaluate" / name, records.schema(records.FAILED))

        def report(done: int, _: int, *note: str, before: int = number * len(rows), name: str = name) -> None:
            if progress is not None:
                progress(before + done, total, ", ".join((name, *note)))

        def timed(images: int, seconds: float, name: str = name) -> None:
            batch: dict[str, Any] = {"images": images, "seconds": round(seconds, 4)}
            if isinstance(engine, LocalEngine):  # other engines generate in other processes
                batch["peak_bytes"] = peak(context.recipe.device)
            places.append(context.run_dir, "drawn", method=name, **batch)

        made_by = {"suite": context.suite.name, "version": context.suite.version, "method": name}
        made_by["asked_sha256"] = samples_fingerprint(context.suite, samples, settings.seeds)
        if not output.is_complete(fingerprints[name]):
            method.prepare([context.suite.reference_image(sample) for sample in subjects], subjects)
        reset_peak(context.recipe.device)
        stage = _Generation(name, method, context, by_id)
        engine.run(stage, shards, output, failed, fingerprints[name], report, made_by, timed)


def take(source: Path, run_dir: Path, name: str, fingerprint: str) -> None:
    """Shares a method's images, and the log of their batches, from a run that generated them with equal settings."""
    share(source / "failed" / "evaluate" / name, run_dir / "failed" / "evaluate" / name, fingerprint)
    if not share(source / "samples" / name, run_dir / "samples" / name, fingerprint):
        return

    def batches(run: Path) -> list[dict[str, Any]]:
        return [each for each in places.read(run) if each.get("event") == "drawn" and each.get("method") == name]

    for batch in batches(source) if not batches(run_dir) else ():
        values = {key: batch[key] for key in batch.keys() - {"event", "time"}}
        places.append(run_dir, "drawn", **values, source=str(source))
