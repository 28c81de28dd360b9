"""The scorers that are vision models: the pocket judges, an embedding judge for any pictures, and the field's metrics.

- `PocketScorer`: CP by the pocket scorer on a scale that renders fix, PF by the attribute reader (`metrics.py`).
- `EmbeddingScorer`: CP by a vision model's similarity, 0 being the mean over references of different subjects (of one
  category, where it has several) and 1 the mean over two pictures of one subject, where the suite has them, else 1. PF
  by CLIP: the share of the reference's other prompts that the picture fits less than its own, on a scale where what
  ignores the prompt, a copy for instance, gets 0.
- `Similarity`: CLIP-I, DINO, DINOv2 between reference and picture, CLIP-T between prompt and picture: plain cosines of
  whole pictures through the model's own processor, as published tables have them. They reward copying.
- `Diversity`: how unlike the pictures of one sample are, over seeds: the mean of 1 − cosine.
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
from diptych.evaluate.scoring import curation, metrics, truth
from diptych.evaluate.scoring.scorers import CopyScorer, Row, Scorer, Values, VlmScorer, pictures_of
from diptych.evaluate.suites import Suite
from diptych.evaluate.suites.pictures import Pictures, square
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
        """A judge of identity."""
        from diptych.judges.embedding import EmbeddingJudge

        return self._open(role, name, lambda: EmbeddingJudge.load(name, role, self.device))

    def embed(self, name: str, role: str = "scorer") -> Embed:
        """What embeds pictures."""
        return self.judge(name, role).embed

    def clip(self, name: str) -> Any:
        """A dual encoder."""
        from diptych.judges.embedding import Clip

        return self._open("clip", name, lambda: Clip.load(name, self.device))

    def reader(self, name: str) -> Any:
        """An attribute reader."""
        from diptych.judges.attributes import AttributeReader

        return self._open("reader", name, lambda: AttributeReader.load(name, self.device))

    def _open(self, kind: str, name: str, load: Callable[[], Any]) -> Any:
        if (kind, name) not in self._opened:
            self._opened[kind, name] = load()
        return self._opened[kind, name]


class PocketScorer:
    """The pocket world's own judges."""

    name = "judge"

    def __init__(self, suite: Suite, scorer: str, reader: str, models: VisionModels) -> None:
        self.suite, self.scorer, self.reader, self.models = suite, scorer, reader, models

    def identity(self) -> dict[str, Any]:
        told = {"scorer": vision.pinned(self.scorer, "scorer"), "reader": vision.pinned(self.reader, "reader")}
        return {"kind": "pocket", "suite": self.suite.fingerprint(), **told}

    @cached_property
    def scales(self) -> dict[str, metrics.Scale]:
        """The scale of each split, from renders."""
        embed = self.models.embed(self.scorer)
        return {split: truth.scale(self.suite, split, embed) for split in self.suite.splits}

    def score(self, rows: Sequence[Row]) -> list[Values | None]:
        embed, read = self.models.embed(self.scorer), self.models.reader(self.reader).read
        images, references = pictures_of(rows, "image"), pictures_of(rows, "reference")
        similarity = curation.similarities(references, images, embed)
        distances = metrics.copy_distances(references, images)
        found: list[Values | None] = []
        for row, alike, distance, reading in zip(rows, similarity, distances, read(images), strict=True):
            scale, asked = self.scales[row["split"]], json.loads(row["asked"])
            met = metrics.following(asked, reading.values)
            found.append(
                {
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
        return found


class EmbeddingScorer:
    """A vision model and CLIP as the judge of any pictures."""

    name = "judge"

    def __init__(self, suite: Pictures, scorer: str, text: str, models: VisionModels) -> None:
        self.suite, self.scorer, self.text, self.models = suite, scorer, text, models
        self._texts: dict[tuple[str, ...], np.ndarray] = {}

    def identity(self) -> dict[str, Any]:
        told = {"scorer": vision.pinned(self.scorer, "scorer"), "text": vision.pinned(self.text, "scorer")}
        return {"kind": "embedding", "suite": self.suite.fingerprint(), **told}

    @cached_property
    def scale(self) -> metrics.Scale:
        """0 and 1 of CP, from the suite's own references."""
        subjects = self.suite.subjects
        embed = self.models.embed(self.scorer)
        first = embed([square(s.picture, self.suite.size, self.suite.spec.fit) for s in subjects])
        near = first @ first.T
        apart = [
            near[i, j]
            for i, a in enumerate(subjects)
            for j, b in enumerate(subjects)
            if i != j and (a.category == b.category or self._alone(a.category))
        ]
        if not apart:
            raise UsageError(
                "an embedding judge compares a reference with others, and the suite has one; use a VLM judge"
            )
        more = [(i, path) for i, s in enumerate(subjects) for path in s.more]
        one = 1.0
        if more:
            again = embed([square(path, self.suite.size, self.suite.spec.fit) for _, path in more])
            one = float(np.mean([first[i] @ row for (i, _), row in zip(more, again, strict=True)]))
        return metrics.Scale(float(np.mean(apart)), one, self.suite.spec.copy_distance, len(subjects))

    def _alone(self, category: str) -> bool:
        return sum(s.category == category for s in self.suite.subjects) == 1

    def _options(self, row: Row) -> tuple[list[str], np.ndarray]:
        """The prompts that a picture is tried with, and their embeddings."""
        own = list(dict.fromkeys(self.suite.subjects[row["identity"]].prompts))
        if len(own) < 2:
            own = list(dict.fromkeys(p for s in self.suite.subjects for p in s.prompts))
        if len(own) < 2:
            raise UsageError("an embedding judge tells prompts apart, and the suite has one; use a VLM judge")
        if (key := tuple(own)) not in self._texts:
            self._texts[key] = self.models.clip(self.text).texts(own)
        return own, self._texts[key]

    def score(self, rows: Sequence[Row]) -> list[Values | None]:
        embed, clip = self.models.embed(self.scorer), self.models.clip(self.text)
        images = pictures_of(rows, "image")
        similarity = curation.similarities(pictures_of(rows, "reference"), images, embed)
        concept = self.scale.concept(similarity)
        found: list[Values | None] = []
        for row, image, alike, cp in zip(rows, clip.images(images), similarity, concept, strict=True):
            prompts, texts = self._options(row)
            fits = texts @ image
            own = fits[prompts.index(row["prompt"])]
            others = np.delete(fits, prompts.index(row["prompt"]))
            pf = float(2 * ((others < own).mean() + 0.5 * (others == own).mean()) - 1)
            found.append({"similarity": round(float(alike), 5), "cp": round(float(cp), 5), "pf": round(pf, 5)})
        return found


class Similarity:
    """One of the field's similarity metrics."""

    def __init__(self, metric: str, model: str, models: VisionModels) -> None:
        self.name = metric.replace("-", "_")
        self.model, self.models = model, models

    def identity(self) -> dict[str, Any]:
        return {"kind": self.name, **vision.pinned(self.model, "scorer")}

    def score(self, rows: Sequence[Row]) -> list[Values | None]:
        images = pictures_of(rows, "image")
        if self.name == "clip_t":
            clip = self.models.clip(self.model)
            found = (clip.images(images) * clip.texts([row["prompt"] for row in rows])).sum(1)
        else:
            found = curation.similarities(pictures_of(rows, "reference"), images, self.models.embed(self.model))
        return [{self.name: round(float(value), 5)} for value in found]


class Diversity:
    """How unlike the pictures of one sample are, over seeds."""

    name = "diversity"

    def __init__(self, model: str, models: VisionModels) -> None:
        self.model, self.models = model, models

    def identity(self) -> dict[str, Any]:
        return {"kind": self.name, **vision.pinned(self.model, "scorer")}

    def score(self, rows: Sequence[Row]) -> list[Values | None]:
        embedded = self.models.embed(self.model)(pictures_of(rows, "image"))
        found: list[Values | None] = []
        for number, row in enumerate(rows):
            others = [i for i, other in enumerate(rows) if other["sample"] == row["sample"] and i != number]
            apart = 1 - embedded[others] @ embedded[number]
            found.append({"diversity": round(float(apart.mean()), 5) if others else None})
        return found


# ---- which scorers an evaluation has


def choose(evaluation: Evaluation, suite: Suite | Pictures, out: Path) -> list[Scorer]:
    """The scorers: judge, copies, similarity metrics, diversity. UsageError for a judge that does not fit."""
    kind, judge = evaluation.judge_kind(), evaluation.judge
    opened = VisionModels(evaluation.device)
    found: list[Scorer] = []
    if kind == "vlm":
        found.append(vlm(evaluation, out))
    elif kind == "pocket":
        if isinstance(suite, Pictures):
            raise UsageError("the pocket judge knows the pocket world alone; judge pictures with vlm or embedding")
        found.append(pocket(evaluation, suite, opened))
    elif isinstance(suite, Pictures):
        found.append(EmbeddingScorer(suite, judge.scorer or METRICS["dinov2"], judge.text, opened))
    else:
        raise UsageError("the embedding judge is for suites of pictures; the pocket suite has judges of its own")
    if kind != "pocket":
        found.append(copies(suite))
    default = () if isinstance(suite, Suite) else suite.spec.metrics
    asked = evaluation.metric_models(default)
    found += [Similarity(name, model, opened) for name, model in asked.items()]
    if len(evaluation.seeds) > 1:
        usual = POCKET if isinstance(suite, Suite) else METRICS["dinov2"]
        eyes = judge.scorer or next((m for n, m in asked.items() if n != "clip-t"), usual)
        found.append(Diversity(eyes, opened))
    return found


def pocket(evaluation: Evaluation, suite: Suite, opened: VisionModels) -> PocketScorer:
    """The pocket world's own judges."""
    return PocketScorer(suite, evaluation.judge.scorer or POCKET, evaluation.judge.reader, opened)


def vlm(evaluation: Evaluation, out: Path) -> Scorer:
    """The vision-language judge, its answers kept in the folder."""
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
        return CopyScorer(lambda: dict.fromkeys(("identities", "kinds"), limit), about)
    return CopyScorer(lambda: truth.copy_thresholds(suite), {"kind": "copy", "suite": suite.fingerprint()})


def weights(evaluation: Evaluation) -> tuple[str, frozenset[str]]:
    """The judge's name and the sha256 of its weights; a vision-language model goes by its name."""
    judge = evaluation.judge
    kind = evaluation.judge_kind()
    if kind == "vlm":
        return judge.model or "", frozenset()
    name = judge.scorer or (POCKET if kind == "pocket" else METRICS["dinov2"])
    return name, models.weights(models.resolve(name, "scorer"))
