"""`/v1/relights` and `/v1/stories`: what OpenAI has no route for, asked and answered like `/v1/images/edits`."""

from __future__ import annotations

import io
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from PIL import Image

from diptych.apps import relight, story
from diptych.data.images import encode_png
from diptych.errors import UsageError
from diptych.serve import worker
from diptych.serve.http import image_routes
from diptych.serve.http.error_responses import answer, documented
from diptych.serve.http.image_routes import ACCEPTED, Owner, Pictures, ServiceDep, draw
from diptych.serve.http.job_routes import JobId
from diptych.serve.request_models import RelightRequest, StoryRequest
from diptych.serve.service import Service

MEDIA = {"png": "image/png", "pdf": "application/pdf"}
router = APIRouter(prefix="/v1", tags=["relights and stories"])
LIT = {"image": True, "mask": False}
TOLD = {"image": False}
PAGES: dict[int | str, dict[str, Any]] = {
    200: {"content": {media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA.values()}}
}


@router.post(
    "/relights",
    response_model=Pictures,
    responses={**documented(415, 500, 504), **ACCEPTED},
    openapi_extra=image_routes.described(RelightRequest, LIT),
)
async def relights(request: Request, service: ServiceDep, owner: Owner) -> Response | Pictures:
    """The scene of `image` under each `light`, everything in its place; a `mask` says what may change."""
    service.limit(owner)
    asked, files = await image_routes.read(request, RelightRequest, LIT)
    return await draw(service, owner, asked, files["image"], request, "relight", files["mask"])


@router.post(
    "/stories",
    response_model=Pictures,
    responses={**documented(415, 500, 504), **ACCEPTED},
    openapi_extra=image_routes.described(StoryRequest, TOLD),
)
async def stories(request: Request, service: ServiceDep, owner: Owner) -> Response | Pictures:
    """Draws the panels of a story of the character in `image`; `/v1/jobs/ID/page` is then the laid-out page."""
    service.limit(owner)
    asked, files = await image_routes.read(request, StoryRequest, TOLD)
    return await draw(service, owner, asked, files["image"], request, "story")


@router.get("/jobs/{id}/page", response_class=Response, responses={**PAGES, **documented(409, 500)})
async def page(
    id: JobId,
    service: ServiceDep,
    owner: Owner,
    kind: Annotated[Literal["png", "pdf"], Query(alias="format")] = "png",
) -> Response:
    """A finished job on one page: a story's, as PNG or PDF; other pictures side by side, as PNG."""
    service.limit(owner, stores=False)
    job = service.store.job(owner, id)
    if job is None:
        return answer(404, "there is no such job")
    if job["status"] != "done":
        return answer(409, f"the job is {job['status']}; a page is made of one that is done")
    data = await service.lanes.large.run(owner, finished, service, job, kind)
    headers = {"Cache-Control": "private, max-age=600", "Content-Disposition": f'inline; filename="{id}.{kind}"'}
    return Response(data, media_type=MEDIA[kind], headers=headers)


# A finished job on one page: a story as it is told, other pictures side by side. Made when it is asked for.


def finished(service: Service, job: dict[str, Any], kind: str) -> bytes:
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
    return image if key is None else worker.mark(image, key)
