"""What looks at pictures: each scorer turns rows of `samples/METHOD/` into values, and remembers what it has seen.

A scorer's values of one method are lines of `scores/METHOD/SCORER.jsonl`, added batch by batch and flushed to the disk.
The first line holds the fingerprint of pictures and scorer; with another one the file begins anew. So scoring goes on
where it was killed, and a judge that is asked through an endpoint is asked nothing twice (its answers are cached, too).
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

SCORING = 1  # raised when equal pictures would get other values
BATCH = 32  # pictures, at least, that are looked at together
Row = dict[str, Any]
Values = dict[str, Any]
Report = Callable[[int], None]  # pictures more


class Scorer(Protocol):
    """What gives values."""

    @property
    def name(self) -> str: ...
    def identity(self) -> dict[str, Any]:
        """What decides its values: models, revisions, preprocessing, wording. Opens nothing large."""
        ...

    def score(self, rows: Sequence[Row]) -> Sequence[Values | None]:
        """Values of each row, all seeds of a sample being together; None: not now, to be tried again next time."""
        ...


class ScoreFile:
    """The values of one scorer for one method."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self._begun = False

    def read(self) -> dict[str, Values]:
        """Values by the picture's id; a line that a kill cut short is none. Empty if they were made by other things."""
        lines = _whole_lines(self.path)
        if not lines or lines[0] != {"fingerprint": self.fingerprint}:
            return {}
        return {line["id"]: {k: v for k, v in line.items() if k != "id"} for line in lines[1:]}

    def add(self, rows: Iterable[tuple[str, Values]]) -> None:
        """More lines, on the disk when this returns."""
        if not self._begun:
            self._begin()
        text = (json.dumps({"id": id} | values, allow_nan=False, ensure_ascii=False) + "\n" for id, values in rows)
        with self.path.open("ab") as stream:
            stream.write("".join(text).encode())
            stream.flush()
            os.fsync(stream.fileno())

    def _begin(self) -> None:
        """A new file, or the old one without what a kill left of a last line."""
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


def file_of(out: Path, method: str, scorer: Scorer, drawn: str) -> ScoreFile:
    """Where a scorer's values of a method are; `drawn` is the fingerprint of its pictures."""
    return ScoreFile(out / "scores" / method / f"{scorer.name}.jsonl", sha256_json([SCORING, scorer.identity(), drawn]))


def score(pictures: Dataset, scorer: Scorer, file: ScoreFile | None, report: Report) -> dict[str, Values]:
    """The values of a scorer for a method's pictures, by id. What `file` holds is not looked at again, and what is new
    is added to it."""
    done = file.read() if file is not None else {}
    ids = pictures.columns("id", "sample")
    missing = {row["sample"] for row in ids if row["id"] not in done}
    report(sum(row["sample"] not in missing for row in ids))
    for batch in batches(row for row in pictures if row["sample"] in missing) if missing else ():
        found = zip(batch, scorer.score(batch), strict=True)
        new = {row["id"]: values for row, values in found if values is not None}
        if file is not None:
            file.add(new.items())
        done |= new
        report(len(batch))
    return done


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in their order, at least `BATCH` together, and a sample never cut in two."""
    batch: list[Row] = []
    for _, own in groupby(rows, key=lambda row: row["sample"]):
        batch += own
        if len(batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


class CopyScorer:
    """How near a picture is to its reference in pixels, and whether that makes it a copy."""

    name = "copy"

    def __init__(self, thresholds: Callable[[], dict[str, float]], about: dict[str, Any]) -> None:
        """`thresholds` gives the distance of each split; `about` says where it comes from."""
        self._open, self._about = thresholds, about
        self._thresholds: dict[str, float] | None = None

    def identity(self) -> dict[str, Any]:
        return self._about

    def score(self, rows: Sequence[Row]) -> list[Values | None]:
        if self._thresholds is None:
            self._thresholds = self._open()
        references, images = (pictures_of(rows, key) for key in ("reference", "image"))
        found = metrics.copy_distances(references, images)
        limits = [self._thresholds[row["split"]] for row in rows]
        return [
            {"copy_distance": round(float(d), 5), "copied": bool(d < limit)}
            for d, limit in zip(found, limits, strict=True)
        ]


def pictures_of(rows: Sequence[Row], key: str) -> list[Any]:
    """The pictures of a column, decoded."""
    return [open_image(row[key]) for row in rows]


# ---- a vision-language model

MOST = 4
QUESTIONS = ("cp", "pf", "cp_debiased")


@cache
def wording() -> dict[str, Any]:
    """What rubric.yaml says."""
    import yaml

    return yaml.safe_load((Path(__file__).parent / "rubric.yaml").read_text("utf8"))


class Rating(BaseModel):
    """The answer."""

    score: int = Field(ge=0, le=MOST, description="Your score.")


class VlmScorer:
    """CP, PF and debiased CP by a vision-language model and the 0 to 4 rubric of DreamBench++ (rubric.yaml).

    For CP it sees reference and image, never the prompt; for PF prompt and image, never the reference. Every question
    is asked `repeats` times; an image's score is the mean of the answers / 4, as published. Answers are cached by
    content.
    """

    name = "judge"

    def __init__(self, open_model: Callable[[], Model], about: dict[str, Any], repeats: int, debiased: bool) -> None:
        """`about` names the model and how it samples; it is opened when there is something to ask."""
        self._open, self._about, self.repeats = open_model, about, repeats
        self.questions = QUESTIONS if debiased else QUESTIONS[:2]
        self._model: Model | None = None

    def identity(self) -> dict[str, Any]:
        words = wording()
        digest = sha256_json(words)
        asked = list(self.questions)
        rubric = {"version": words["version"], "sha256": digest, "size": words["size"], "questions": asked}
        return {"kind": "vlm", **self._about, "rubric": rubric, "repeats": self.repeats}

    def score(self, rows: Sequence[Row]) -> list[Values | None]:
        if self._model is None:
            self._model = self._open()
        found = answers(self._model, self.asked(rows))
        return [self._values(number, found) for number in range(len(rows))]

    def asked(self, rows: Sequence[Row]) -> Iterator[Question]:
        """Every question about the rows; tags are `row/question/repeat`."""
        for number, row in enumerate(rows):
            image, reference = shown(row["image"]), shown(row["reference"])
            turns = {
                "cp": concept(reference, image),
                "pf": following(row["prompt"], image),
                "cp_debiased": concept(reference, image, debiased=True),
            }
            for name in self.questions:
                for repeat in range(self.repeats):
                    yield Question(turns[name], Rating, f"{number}/{name}/{repeat}", repeat)

    def _values(self, number: int, found: dict[str, Outcome]) -> Values | None:
        values: Values = {"votes": {}}
        tokens = [0, 0]
        for name in self.questions:
            outcomes = [found[f"{number}/{name}/{repeat}"] for repeat in range(self.repeats)]
            if any(outcome.status == "failed" for outcome in outcomes):
                return None
            votes = [outcome.answer["score"] for outcome in outcomes if outcome.answer is not None]
            values["votes"][name] = votes
            values[name] = round(sum(votes) / len(votes) / MOST, 5) if votes else None
            for outcome in outcomes:
                tokens = [tokens[0] + outcome.usage.input_tokens, tokens[1] + outcome.usage.output_tokens]
        return values | {"judge_tokens": tokens}


def concept(reference: EncodedImage, image: EncodedImage, debiased: bool = False) -> tuple[Message, ...]:
    """How much of the reference's subject a picture keeps."""
    words = wording()["concept"]
    task = f"{words['task']}\n{words['debiased']}" if debiased else words["task"]
    return user(task), plan(words), user("The reference:", reference, "The picture:", image)


def following(prompt: str, image: EncodedImage) -> tuple[Message, ...]:
    """How well a picture does what the prompt says."""
    words = wording()["prompt"]
    return user(words["task"]), plan(words), user(quoted(prompt, "prompt"), "The picture:", image)


def plan(words: dict[str, Any]) -> Message:
    """The judge's plan, as if it had said so."""
    return Message("assistant", (words["plan"],))


def shown(cell: Any) -> EncodedImage:
    """A picture as the judge sees it: a square PNG of the rubric's size."""
    from PIL import Image

    side = (wording()["size"],) * 2
    image = open_image(cell)
    if image.size != side:
        image = image.resize(side, Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=6)
    return encode(data.getvalue())
