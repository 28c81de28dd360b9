"""A vision-language model as the scorer of pictures: CP and PF by the 0 to 4 rubric of DreamBench++ (rubric.yaml).

For CP it sees reference and picture, and never the prompt; for PF prompt and picture, and never the reference. Every
question is asked `repeats` times; a picture's score is the mean of the answers / 4, a method's the mean over its
pictures, and CP·PF the product of the two means: the published aggregation. Answers are cached by content.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from diptych.data.images import open_image
from diptych.evaluate.scoring.scorers import Row, Values
from diptych.llm.model import Model, answers
from diptych.llm.outcome import Outcome
from diptych.llm.question import Message, Picture, Question, picture, quoted, user

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
    """CP, PF and debiased CP by a vision-language model."""

    name = "judge"

    def __init__(self, open_model: Callable[[], Model], about: dict[str, Any], repeats: int, debiased: bool) -> None:
        """`about` names the model and how it samples; it is opened when there is something to ask."""
        self._open, self._about, self.repeats = open_model, about, repeats
        self.questions = QUESTIONS if debiased else QUESTIONS[:2]
        self._model: Model | None = None

    def identity(self) -> dict[str, Any]:
        words = wording()
        digest = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
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


def concept(reference: Picture, image: Picture, debiased: bool = False) -> tuple[Message, ...]:
    """How much of the reference's subject a picture keeps."""
    words = wording()["concept"]
    task = f"{words['task']}\n{words['debiased']}" if debiased else words["task"]
    return user(task), plan(words), user("The reference:", reference, "The picture:", image)


def following(prompt: str, image: Picture) -> tuple[Message, ...]:
    """How well a picture does what the prompt says."""
    words = wording()["prompt"]
    return user(words["task"]), plan(words), user(quoted(prompt, "prompt"), "The picture:", image)


def plan(words: dict[str, Any]) -> Message:
    """The judge's plan, as if it had said so."""
    return Message("assistant", (words["plan"],))


def shown(cell: Any) -> Picture:
    """A picture as the judge sees it: a square PNG of the rubric's size."""
    from PIL import Image

    side = (wording()["size"],) * 2
    image = open_image(cell)
    if image.size != side:
        image = image.resize(side, Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=6)
    return picture(data.getvalue())
