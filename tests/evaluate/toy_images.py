"""A toy world in DreamBench++'s published layout: a subject is the color in the middle, and a prompt determines the
color around it. So a judge can be exact by comparing pixels."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diptych.evaluate.methods.common import Method
from llm.chat_server import Act, Call, say

SUBJECTS = {
    "live_subject/animal": ("cotton-top tamarin", "Shih-Tzu"),
    "live_subject/human": ("Spider-Man", "man in a t-shirt"),
    "object": ("Rolls-Royce hood ornament", "low-poly fox"),
    "style": ("ukiyo-e",),
}
SIDE = 32
GRAY = (128, 128, 128)


def color_of(text: str) -> tuple[int, int, int]:
    """A vivid color for a text."""
    digest = hashlib.sha256(text.encode()).digest()
    return tuple(30 + 180 * (byte % 2) for byte in digest[:3]) if digest[3] % 7 else (30, 120, 210)  # pyright: ignore


def paint(inner: Any, around: Any) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), around)
    image.paste(inner, (SIDE // 4, SIDE // 4, 3 * SIDE // 4, 3 * SIDE // 4))
    return image


def make_folder(folder: Path) -> Path:
    """data/images/**/CATEGORY/NN.jpg and data/captions/**/CATEGORY/NN.txt."""
    number = 0
    for category, subjects in SUBJECTS.items():
        for place, name in enumerate(subjects):
            picture = folder / "data" / "images" / category / f"{place:02d}.jpg"
            caption = folder / "data" / "captions" / category / f"{place:02d}.txt"
            for path in (picture, caption):
                path.parent.mkdir(parents=True, exist_ok=True)
            inner = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30), (30, 220, 220), (220, 30, 220)][
                number % 6
            ]
            paint(inner, GRAY).save(picture, quality=95)
            caption.write_text("\n".join([name, *(f"a {name}, scene {name} {i}" for i in range(9))]) + "\n")
            number += 1
    return folder


class _Drawn(Method):
    def __init__(self, context: Any) -> None:
        self.suite = context.suite

    def fingerprint(self) -> str:
        return type(self).__name__


class Good(_Drawn):
    """The reference's subject, where the prompt wants it."""

    def generate(self, references: Sequence[Any], samples: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
        middle = (SIDE // 2, SIDE // 2)
        return [paint(r.getpixel(middle), color_of(s.prompt)) for r, s in zip(references, samples, strict=True)]


class Ignores(_Drawn):
    """What the prompt wants, with another subject of the category."""

    def generate(self, references: Sequence[Any], samples: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
        found = []
        for sample in samples:
            own = self.suite.of(sample)
            other = next(s for s in self.suite.subjects if s.category == own.category and s.id != own.id)
            found.append(paint(Image.open(other.image).getpixel((SIDE // 2, SIDE // 2)), color_of(sample.prompt)))
        return found


def near(a: Any, b: Any) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < 40


def pictures(call: Call) -> list[Image.Image]:
    """The images of a call's last message."""
    parts = [part for part in call.body["messages"][-1]["content"] if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))) for part in parts]


def honest(call: Call) -> Act:
    """An exact judge: 4 if the color matches, else 0; a pasted reference gets 1 if the question marks it down."""
    seen = pictures(call)
    middle, corner = (256, 256), (20, 20)
    if len(seen) == 2:
        reference, image = seen
        score = 4 if near(reference.getpixel(middle), image.getpixel(middle)) else 0
        if "pasted" in call.text() and near(reference.getpixel(corner), image.getpixel(corner)):
            score = min(score, 1)
    else:
        prompt = re.search(r"<<<prompt-\w+\n(.*)\nprompt-", call.text(-1), re.DOTALL)
        assert prompt is not None
        score = 4 if near(seen[0].getpixel(corner), color_of(prompt[1])) else 0
    return say(json.dumps({"score": score}))
