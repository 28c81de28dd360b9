"""The scorers that are vision models: the pocket judges, an embedding judge for any images, and similarity metrics.

- `PocketScorer`: CP by the pocket scorer on a scale fixed by renders, PF by the attribute reader (`metrics.py`).
- `EmbeddingScorer`: CP is a vision model's similarity. 0 is the mean over references of different subjects, of one
  category if it has several. 1 is the mean over two images of one subject; if the suite has only one image of each, it
  is a similarity of 1. PF is CLIP's: the share of the reference's other prompts that fit the image less than the
  sample's prompt, scaled so that a method that ignores the prompt, such as a copy, gets 0.
- `Similarity`: CLIP-I, DINO and DINOv2 between reference and image, CLIP-T between prompt and image. These are plain
  cosines of whole images through the model's processor, as in published tables. They reward copying.
- `Diversity`: the difference between images of one sample over seeds, as the mean of 1 − cosine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diptych.errors import UsageError
from diptych.evaluate.evaluation import METRICS, POCKET, Evaluation
from diptych.evaluate.scoring import curation, metrics, quality, truth
from diptych.evaluate.scoring.scorers import CopyScorer, Row, Scorer, Values, VlmScorer, images_of
from diptych.evaluate.suites import MAIN, Split, Suite
from diptych.evaluate.suites.images import ImageSuite, square
from diptych.judges import vision
from diptych.utils import models

ANSWERS = "answers.sqlite"
Embed = curation.Embed


class VisionModels:
    """Vision models, each opened once and when first needed."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._opened: dict[tuple[str, str], Any] = {}

    def judge(self, name: str, role: str = "scorer") -> Any:
        """Opens a judge of identity."""
        from diptych.judges.embedding import EmbeddingJudge

        return self._open(role, name, lambda: EmbeddingJudge.load(name, role, self.device))

    def embed(self, name: str, role: str = "scorer") -> Embed:
        """Opens a judge of identity and returns the function that embeds images."""
        return self.judge(name, role).embed

    def clip(self, name: str) -> Any:
        """Opens a CLIP model."""
        from diptych.judges.embedding import Clip

        return self._open("clip", name, lambda: Clip.load(name, self.device))

    def reader(self, name: str) -> Any:
        """Opens an attribute reader."""
        from diptych.judges.attributes import AttributeReader

        return self._open("reader", name, lambda: AttributeReader.load(name, self.device))

    def _open(self, kind: str, name: str, load: Callable[[], Any]) -> Any:
        if (kind, name) not in self._opened:
            self._opened[kind, name] = load()
        return self._opened[kind, name]


class PocketScorer:
    """The pocket world's judges."""

    name = "judge"

    def __init__(self, suite: Suite, scorer: str, reader: str, models: VisionModels) -> None:
        self.suite, self.scorer, self.reader, self.models = suite, scorer, reader, models
        self._galleries: dict[tuple[Split, int], np.ndarray] = {}

    def identity(self) -> dict[str, Any]:
        judges = {"scorer": vision.pinned(self.scorer, "scorer"), "reader": vision.pinned(self.reader, "reader")}
        return {"kind": "pocket", "suite": self.suite.fingerprint(), **judges}

    @cached_property
    def scales(self) -> dict[str, metrics.Scale]:
        """The scale of each split, from renders."""
        embed = self.models.embed(self.scorer)
        return {split: truth.scale(self.suite, split, embed) for split in self.suite.splits}

    def _rivals(self, split: Split, identity: int) -> np.ndarray:
        """The embeddings of the other subjects of a sample's gallery."""
        if (split, identity) not in self._galleries:
            others = self.suite.rivals(split, identity, quality.GALLERY - 1)
            self._galleries[split, identity] = self.models.embed(self.scorer)(others)
        return self._galleries[split, identity]

    def features(self, images: Sequence[Any]) -> np.ndarray:
        """What the kernel distance compares: the reader's texture statistics."""
        return self.models.reader(self.reader).texture(images)

    def like(self, split: Split) -> list[Any]:
        """What good images of a split look like: renders of other subjects."""
        return truth.targets(truth.checked(self.suite, split))

    def score(self, rows: Sequence[Row]) -> list[Values | None]:
        embed, read = self.models.embed(self.scorer), self.models.reader(self.reader).read
        images, references = images_of(rows, "image"), images_of(rows, "reference")
        similarity = curation.similarities(references, images, embed)
        distances = metrics.copy_distances(references, images)
        embedded, readings = embed(images), read(images)
        scored: list[Values | None] = []
        for number, row in enumerate(rows):
            alike, distance, reading = similarity[number], distances[number], readings[number]
            scale, asked = self.scales[row["split"]], json.loads(row["asked"])
            met = metrics.following(asked, reading.values)
            rivals = self._rivals(row["split"], row["identity"])
            carried = quality.traits(self.suite.traits(row["split"], row["identity"]), reading.values)
            scored.append(
                {
                    "similarity": round(float(alike), 5),
                    "cp": round(float(scale.concept(np.array([alike]))[0]), 5),
                    "pf": round(sum(met.values()) / len(met), 5),
                    "copy_distance": round(float(distance), 5),
                    "copied": bool(distance < scale.copy_distance),
                    "asked": asked,
                    "read": {group: reading.values.get(group) for group in asked},
                    "met": met,
                    "retrieved": quality.retrieved(alike, rivals @ embedded[number]),
                    "traits": round(sum(carried.values()) / len(carried), 5) if carried else None,
                    "carried": carried,
                    "sharpness": round(quality.sharpness(images[number]), 4),
                }
            )
        return scored


class EmbeddingScorer:
    """A vision model and CLIP as the judge of any images."""

    name = "judge"

    def __init__(self, suite: ImageSuite, scorer: str, text: str, models: VisionModels) -> None:
        self.suite, self.scorer, self.text, self.models = suite, scorer, text, models
        self._texts: dict[tuple[str, ...], np.ndarray] = {}

    def identity(self) -> dict[str, Any]:
        judges = {"scorer": vision.pinned(self.scorer, "scorer"), "text": vision.pinned(self.text, "scorer")}
        return {"kind": "embedding", "suite": self.suite.fingerprint(), **judges}

    @cached_property
    def references(self) -> np.ndarray:
        """The embeddings of the suite's references, in order."""
        return self.features(self.like(MAIN))

    def features(self, images: Sequence[Any]) -> np.ndarray:
        """What the kernel distance compares: the scoring model's embeddings."""
        return self.models.embed(self.scorer)(images)

    def like(self, split: Split) -> list[Any]:
        """What good images look like: the references."""
        return [square(s.image, self.suite.size, self.suite.spec.fit) for s in self.suite.subjects]

    @cached_property
    def scale(self) -> metrics.Scale:
        """The scale of CP, from the suite's references. UsageError if the suite has one subject."""
        subjects = self.suite.subjects
        embed, first = self.models.embed(self.scorer), self.references
        near = first @ first.T
        apart = [
            near[i, j]
            for i, a in enumerate(subjects)
            for j, b in enumerate(subjects)
            if i != j and (a.category == b.category or self._alone(a.category))
        ]
        if not apart:
            message = "The embedding judge compares references with each other, but the suite has one. Use --judge vlm."
            raise UsageError("judge_invalid", message)
        more = [(i, path) for i, s in enumerate(subjects) for path in s.more]
        one = 1.0
        if more:
            again = embed([square(path, self.suite.size, self.suite.spec.fit) for _, path in more])
            one = float(np.mean([first[i] @ row for (i, _), row in zip(more, again, strict=True)]))
        return metrics.Scale(float(np.mean(apart)), one, self.suite.spec.copy_distance, len(subjects))

    def _alone(self, category: str) -> bool:
        return sum(s.category == category for s in self.suite.subjects) == 1

    def _options(self, row: Row) -> tuple[list[str], np.ndarray]:
        """The prompts to compare with an image, and their embeddings. UsageError if the suite has one prompt."""
        prompts = list(dict.fromkeys(self.suite.subjects[row["identity"]].prompts))
        if len(prompts) < 2:
            prompts = list(dict.fromkeys(p for s in self.suite.subjects for p in s.prompts))
        if len(prompts) < 2:
            message = "The embedding judge compares prompts with each other, but the suite has one. Use --judge vlm."
            raise UsageError("judge_invalid", message)
        if (key := tuple(prompts)) not in self._texts:
            self._texts[key] = self.models.clip(self.text).texts(prompts)
        return prompts, self._texts[key]

    def score(self, rows: Sequence[Row]) -> list[Values | None]:
        embed, clip = self.models.embed(self.scorer), self.models.clip(self.text)
        images = images_of(rows, "image")
        similarity = curation.similarities(images_of(rows, "reference"), images, embed)
        concept = self.scale.concept(similarity)
        pictured, embedded = clip.images(images), embed(images)
        scored: list[Values | None] = []
        for number, row in enumerate(rows):
            alike, cp = similarity[number], concept[number]
            prompts, texts = self._options(row)
            fits = texts @ pictured[number]
            fit = fits[prompts.index(row["prompt"])]
            others = np.delete(fits, prompts.index(row["prompt"]))
            pf = float(2 * ((others < fit).mean() + 0.5 * (others == fit).mean()) - 1)
            rivals = self.suite.rivals(row["identity"], quality.GALLERY - 1)
            own = quality.retrieved(alike, self.references[rivals] @ embedded[number]) if rivals else None
            values = {"similarity": round(float(alike), 5), "cp": round(float(cp), 5), "pf": round(pf, 5)}
            scored.append(values | {"retrieved": own, "sharpness": round(quality.sharpness(images[number]), 4)})
        return scored


class Similarity:
    """A similarity metric: CLIP-I, CLIP-T, DINO or DINOv2."""

    def __init__(self, metric: str, model: str, models: VisionModels) -> None:
        self.name = metric.replace("-", "_")
        self.model, self.models = model, models

    def identity(self) -> dict[str, Any]:
        return {"kind": self.name, **vision.pinned(self.model, "scorer")}

    def score(self, rows: Sequence[Row]) -> list[Values | None]:
        images = images_of(rows, "image")
        if self.name == "clip_t":
            clip = self.models.clip(self.model)
            cosines = (clip.images(images) * clip.texts([row["prompt"] for row in rows])).sum(1)
        else:
            cosines = curation.similarities(images_of(rows, "reference"), images, self.models.embed(self.model))
        return [{self.name: round(float(value), 5)} for value in cosines]


class Diversity:
    """The difference between images of one sample, over seeds."""

    name = "diversity"

    def __init__(self, model: str, models: VisionModels) -> None:
        self.model, self.models = model, models

    def identity(self) -> dict[str, Any]:
        return {"kind": self.name, **vision.pinned(self.model, "scorer")}

    def score(self, rows: Sequence[Row]) -> list[Values | None]:
        embedded = self.models.embed(self.model)(images_of(rows, "image"))
        scored: list[Values | None] = []
        for number, row in enumerate(rows):
            others = [i for i, other in enumerate(rows) if other["sample"] == row["sample"] and i != number]
            apart = 1 - embedded[others] @ embedded[number]
            scored.append({"diversity": round(float(apart.mean()), 5) if others else None})
        return scored


# ---- the scorers of an evaluation


def choose(evaluation: Evaluation, suite: Suite | ImageSuite, out: Path) -> list[Scorer]:
    """The scorers: judge, copies, similarity metrics, diversity. UsageError for a judge that does not fit the suite."""
    kind, judge = evaluation.judge_kind(), evaluation.judge
    opened = VisionModels(evaluation.device)
    scorers: list[Scorer] = []
    if kind == "vlm":
        scorers.append(vlm(evaluation, out))
    elif kind == "pocket":
        if isinstance(suite, ImageSuite):
            message = "The pocket judge works with the pocket suite only. Use --judge vlm or --judge embedding."
            raise UsageError("judge_invalid", message)
        scorers.append(pocket(evaluation, suite, opened))
    elif isinstance(suite, ImageSuite):
        scorers.append(EmbeddingScorer(suite, judge.scorer or METRICS["dinov2"], judge.text, opened))
    else:
        message = "The embedding judge works with suites of images only. Use --judge pocket for the pocket suite."
        raise UsageError("judge_invalid", message)
    if kind != "pocket":
        scorers.append(copies(suite))
    default = () if isinstance(suite, Suite) else suite.spec.metrics
    similarities = evaluation.metric_models(default)
    scorers += [Similarity(name, model, opened) for name, model in similarities.items()]
    if len(evaluation.seeds) > 1:
        usual = POCKET if isinstance(suite, Suite) else METRICS["dinov2"]
        model = judge.scorer or next((m for n, m in similarities.items() if n != "clip-t"), usual)
        scorers.append(Diversity(model, opened))
    return scorers


def pocket(evaluation: Evaluation, suite: Suite, opened: VisionModels) -> PocketScorer:
    """The pocket world's judges."""
    return PocketScorer(suite, evaluation.judge.scorer or POCKET, evaluation.judge.reader, opened)


def vlm(evaluation: Evaluation, out: Path) -> Scorer:
    """The vision-language judge. Its answers are stored in the folder."""
    from diptych.llm.client import open_model

    judge = evaluation.judge
    about: dict[str, Any] = {"model": str(judge.model), "sampling": judge.served.sampling() if judge.served else {}}

    def open_judge() -> Any:
        return open_model(judge.endpoint, judge.local, judge.vllm, cache=out / ANSWERS, device=evaluation.device)

    return VlmScorer(open_judge, about, judge.repeats, judge.debiased)


def copies(suite: Suite | ImageSuite) -> Scorer:
    """The scorer of copies, with the distance of the nearest 1 % of true re-renders, or that of a suite of images."""
    if isinstance(suite, ImageSuite):
        limit = suite.spec.copy_distance
        about = {"kind": "copy", "copy_distance": limit}
        return CopyScorer(lambda: dict.fromkeys(("identities", "kinds"), limit), about)

    def thresholds() -> dict[str, float]:
        return {split: truth.copy_threshold(suite, split) for split in suite.splits}

    return CopyScorer(thresholds, {"kind": "copy", "suite": suite.fingerprint()})


def weights(evaluation: Evaluation) -> tuple[str, frozenset[str]]:
    """The judge's name and the sha256 of its weights; a vision-language model has only its name."""
    judge = evaluation.judge
    kind = evaluation.judge_kind()
    if kind == "vlm":
        return judge.model or "", frozenset()
    name = judge.scorer or (POCKET if kind == "pocket" else METRICS["dinov2"])
    return name, models.weights(models.resolve(name, "scorer"))
