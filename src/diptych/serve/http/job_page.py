"""A finished job on one page: a story as it is told, other pictures side by side. Made when it is asked for."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from diptych.apps import relight, story
from diptych.data.images import encode_png
from diptych.errors import UsageError
from diptych.serve import watermark
from diptych.serve.service import Service

MEDIA = {"png": "image/png", "pdf": "application/pdf"}


def page(service: Service, job: dict[str, Any], kind: str) -> bytes:
    """The page as `png`, or, of a story, as `pdf`. UsageError for another kind of job's PDF."""
    request, made_by = job["request"], job["pictures"][0]["made_by"]
    if kind == "pdf" and request["kind"] != "story":
        raise UsageError("format: only stories are made as PDF; this job's page is a png")
    drawn = [Image.open(io.BytesIO(data)).convert("RGB") for data in service.store.drawn(job["number"])]
    if request["kind"] != "story":
        return encode_png(_marked(service, relight.strip(drawn)), made_by)
    panels = [story.read_panel(line) for line in request["panels"]]
    seeds = [picture["seed"] for picture in job["pictures"]]
    told = story.bind(drawn, panels, seeds, made_by, title=request["title"], captions=request["captions"])
    told.page = _marked(service, told.page)
    return told.pdf() if kind == "pdf" else encode_png(told.page, told.provenance)


def _marked(service: Service, image: Image.Image) -> Image.Image:
    """With the invisible mark, if pictures here get one: enlarging lost theirs."""
    key = service.settings.watermark
    return image if key is None else watermark.mark(image, key)
