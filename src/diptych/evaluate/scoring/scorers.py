"""Scorers: each turns rows of `samples/METHOD/` into values and stores them, so that scoring resumes.

A scorer's values of one method are lines of `scores/METHOD/SCORER.jsonl`, appended batch by batch and flushed to disk.
The first line has the fingerprint of images and scorer; if it differs, the file starts again. Answers of a judge behind
an endpoint are cached too, so no question is paid for twice.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, Field

from diptych.data.images import open_image
from diptych.data.store import Dataset
from diptych.evaluate.scoring import metrics
from diptych.llm.client import Model, answers
from diptych.llm.question import EncodedImage, Message, Outcome, Question, encode, quoted, user
from diptych.utils.io import sha256_json
from diptych.utils.paths import refuse_link

SCORING = 2  # raised when equal images would get other values
BATCH = 32  # images of a batch, at least
Row = dict[str, Any]
Values = dict[str, Any]
Report = Callable[[int], None]  # (images scored since the last call)


class Scorer(Protocol):
    """Gives values to images."""

    @property
    def name(self) -> str: ...
    def identity(self) -> dict[str, Any]:
        """What decides the values: models, revisions, preprocessing, wording. Opens no large file."""
        ...

    def score(self, rows: Sequence[Row]) -> Sequence[Values | None]:
        """Values of each row; all seeds of a sample are in one call. None: failed for now, to be tried again."""
        ...


class ScoreFile:
    """The values of one scorer for one method."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self._begun = False

    def read(self) -> dict[str, Values]:
        """Values by id of the image, without an incomplete last line. Empty if the fingerprint differs."""
        lines = _whole_lines(self.path)
        if not lines or lines[0] != {"fingerprint": self.fingerprint}:
            return {}
        return {line["id"]: {k: v for k, v in line.items() if k != "id"} for line in lines[1:]}

    def add(self, rows: Iterable[tuple[str, Values]]) -> None:
        """Appends lines and flushes them to disk."""
        if not self._begun:
            self._begin()
        text = (json.dumps({"id": id} | values, allow_nan=False, ensure_ascii=False) + "\n" for id, values in rows)
        with self.path.open("ab") as stream:
            stream.write("".join(text).encode())
            stream.flush()
            os.fsync(stream.fileno())

    def _begin(self) -> None:
        """Starts the file, or removes an incomplete last line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(self.path)
        lines = _whole_lines(self.path)
        if not lines or lines[0] != {"fingerprint": self.fingerprint}:
            self.path.write_bytes(json.dumps({"fingerprint": self.fingerprint}).encode() + b"\n")
        else:
            with self.path.open("rb+") as stream:
                data = stream.read()
                stream.truncate(len(data) - len(data.rpartition(b"\n")[2]))
        self._begun = True


def _whole_lines(path: Path) -> list[Any]:
    data = path.read_bytes() if path.is_file() else b""
    try:
        return [json.loads(line) for line in data.rpartition(b"\n")[0].split(b"\n") if line]
    except ValueError:
        return []


def score_file(out: Path, method: str, scorer: Scorer, images: str) -> ScoreFile:
    """The file of a scorer's values for a method; `images` is the fingerprint of the method's images."""
    fingerprint = sha256_json([SCORING, scorer.identity(), images])
    return ScoreFile(out / "scores" / method / f"{scorer.name}.jsonl", fingerprint)


def score(images: Dataset, scorer: Scorer, file: ScoreFile | None, report: Report) -> dict[str, Values]:
    """A scorer's values for a method's images, by id. Images whose values are in `file` are skipped, and new values are
    appended to it."""
    done = file.read() if file is not None else {}
    ids = images.columns("id", "sample")
    missing = {row["sample"] for row in ids if row["id"] not in done}
    report(sum(row["sample"] not in missing for row in ids))
    for batch in batches(row for row in images if row["sample"] in missing) if missing else ():
        scored = zip(batch, scorer.score(batch), strict=True)
        new = {row["id"]: values for row, values in scored if values is not None}
        if file is not None:
            file.add(new.items())
        done |= new
        report(len(batch))
    return done


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Batches of at least `BATCH` rows in order, without splitting a sample."""
    batch: list[Row] = []
    for _, of_sample in groupby(rows, key=lambda row: row["sample"]):
        batch += of_sample
        if len(batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


class CopyScorer:
    """Pixel distance of an image to its reference, and whether that makes it a copy."""

    name = "copy"

    def __init__(self, thresholds: Callable[[], dict[str, float]], about: dict[str, Any]) -> None:
        """`thresholds` computes the distance of each split when it is first needed; `about` identifies it."""
        self._thresholds, self._about = cache(thresholds), about

    def identity(self) -> dict[str, Any]:
        return self._about

    def score(self, rows: Sequence[Row]) -> list[Values | None]:
        distances = metrics.copy_distances(images_of(rows, "reference"), images_of(rows, "image"))
        limits = [self._thresholds()[row["split"]] for row in rows]
        return [
            {"copy_distance": round(float(d), 5), "copied": bool(d < limit)}
            for d, limit in zip(distances, limits, strict=True)
        ]


def images_of(rows: Sequence[Row], key: str) -> list[Any]:
    """The images of a column, decoded."""
    return [open_image(row[key]) for row in rows]


# ---- a vision-language model

HIGHEST = 4
QUESTIONS = ("cp", "pf", "cp_debiased")


@cache
def rubric() -> dict[str, Any]:
    """The content of rubric.yaml."""
    import yaml

    return yaml.safe_load(Path(__file__).with_name("rubric.yaml").read_text("utf8"))


class Rating(BaseModel):
    """The answer."""

    score: int = Field(ge=0, le=HIGHEST, description="Your score.")


class VlmScorer:
    """CP, PF and debiased CP by a vision-language model and the 0 to 4 rubric of DreamBench++ (rubric.yaml).

    For CP it sees reference and image, never the prompt; for PF prompt and image, never the reference. Every question
    has `repeats` answers, and an image's score is their mean / 4, as published. Answers are cached by content.
    """

    name = "judge"

    def __init__(self, open_model: Callable[[], Model], about: dict[str, Any], repeats: int, debiased: bool) -> None:
        """`open_model` is called for the first question; `about` has the model's name and sampling settings."""
        self._model, self._about, self.repeats = cache(open_model), about, repeats
        self.questions = QUESTIONS if debiased else QUESTIONS[:2]

    def identity(self) -> dict[str, Any]:
        words = rubric()
        about = {"version": words["version"], "sha256": sha256_json(words), "size": words["size"]}
        about |= {"questions": list(self.questions)}
        return {"kind": "vlm", **self._about, "rubric": about, "repeats": self.repeats}

    def score(self, rows: Sequence[Row]) -> list[Values | None]:
        outcomes = answers(self._model(), self.all_questions(rows))
        return [self._values(number, outcomes) for number in range(len(rows))]

    def all_questions(self, rows: Sequence[Row]) -> Iterator[Question]:
        """Every question about the rows; tags are `row/question/repeat`."""
        for number, row in enumerate(rows):
            image, reference = squared(row["image"]), squared(row["reference"])
            turns = {
                "cp": concept(reference, image),
                "pf": following(row["prompt"], image),
                "cp_debiased": concept(reference, image, debiased=True),
            }
            for name in self.questions:
                for repeat in range(self.repeats):
                    yield Question(turns[name], Rating, f"{number}/{name}/{repeat}", repeat)

    def _values(self, number: int, outcomes: dict[str, Outcome]) -> Values | None:
        values: Values = {"votes": {}}
        tokens = [0, 0]
        for name in self.questions:
            repeats = [outcomes[f"{number}/{name}/{repeat}"] for repeat in range(self.repeats)]
            if any(outcome.status == "failed" for outcome in repeats):
                return None
            votes = [outcome.answer["score"] for outcome in repeats if outcome.answer is not None]
            values["votes"][name] = votes
            values[name] = round(sum(votes) / len(votes) / HIGHEST, 5) if votes else None
            for outcome in repeats:
                tokens = [tokens[0] + outcome.usage.input_tokens, tokens[1] + outcome.usage.output_tokens]
        return values | {"judge_tokens": tokens}


def concept(reference: EncodedImage, image: EncodedImage, debiased: bool = False) -> tuple[Message, ...]:
    """The question of how well an image preserves the reference's subject."""
    words = rubric()["concept"]
    task = f"{words['task']}\n{words['debiased']}" if debiased else words["task"]
    return user(task), plan(words), user("The reference:", reference, "The picture:", image)


def following(prompt: str, image: EncodedImage) -> tuple[Message, ...]:
    """The question of how well an image follows the prompt."""
    words = rubric()["prompt"]
    return user(words["task"]), plan(words), user(quoted(prompt, "prompt"), "The picture:", image)


def plan(words: dict[str, Any]) -> Message:
    """The judge's plan, as a turn of the judge."""
    return Message("assistant", (words["plan"],))


def squared(cell: Any) -> EncodedImage:
    """An image as the judge sees it: a square PNG of the rubric's size."""
    from PIL import Image

    side = (rubric()["size"],) * 2
    image = open_image(cell)
    if image.size != side:
        image = image.resize(side, Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=6)
    return encode(data.getvalue())
