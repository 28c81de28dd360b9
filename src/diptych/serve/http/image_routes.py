"""`/v1/images/generations` and `/v1/images/edits` in OpenAI's format, so that the official client works unchanged, and
`/v1/relights` and `/v1/stories` in the same format, for which OpenAI has no routes.

Generations take JSON, with the additional field `reference` (base64) for an image of a subject. The others take a form
with the image as `image`; edits also take JSON with base64. Each request makes a job and waits for it. `wait=false`
responds at once; `stream=true` streams OpenAI's server-sent events.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from diptych.serve.http.error_responses import answer, body, documented
from diptych.serve.http.openapi import JSON, described, described_json, from_base64, media_of, read, read_json
from diptych.serve.job_store import FAILED
from diptych.serve.limits import Busy
from diptych.serve.request_models import (
    EditRequest,
    GenerationRequest,
    ImageRequest,
    JobRequest,
    RelightRequest,
    StoryRequest,
)
from diptych.serve.service import Service, warnings_of

GENERATION, EDIT = "image_generation", "image_edit"


class ImageItem(BaseModel):
    """One image of a response."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int
    id: str
    warnings: list[str] = []


class ImagesResponse(BaseModel):
    """OpenAI's response, with the settings of the images."""

    created: int
    data: list[ImageItem]
    output_format: str
    size: str | None = None
    background: str = "opaque"
    quality: str = "auto"
    job: str
    settings: dict[str, Any]
    warnings: list[str] = []


def service_of(request: Request) -> Service:
    """Returns the service of a request's app."""
    return request.app.state.service


def owner_of(request: Request) -> str:
    """Returns the owner of a request, set by the guard."""
    return request.state.owner


Owner = Annotated[str, Depends(owner_of)]
ServiceDep = Annotated[Service, Depends(service_of)]
router = APIRouter(prefix="/v1/images", tags=["images"], responses=documented(500, 504))
ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"description": "With `wait` false: the job.", "model": dict[str, Any]}
}


@router.post(
    "/generations", response_model=ImagesResponse, responses=ACCEPTED, openapi_extra=described_json(GenerationRequest)
)
async def generations(request: Request, service: ServiceDep, owner: Owner) -> Response | ImagesResponse:
    """Generates images from a prompt, of the subject of `reference` if given, else from the text alone."""
    service.limit(owner)  # before the body is read
    parsed = await read_json(request, GenerationRequest)
    data = None
    if parsed.reference is not None:
        limit = service.settings.limits.upload_bytes
        data = await service.lanes.small.run(owner, from_base64, parsed.reference, limit)
    plain = ImageRequest(**parsed.model_dump(exclude={"reference"}))
    return await respond(service, owner, plain, data, request, GENERATION)


@router.post(
    "/edits",
    response_model=ImagesResponse,
    responses={**documented(415), **ACCEPTED},
    openapi_extra=described(ImageRequest, {"image": True}, EditRequest),
)
async def edits(request: Request, service: ServiceDep, owner: Owner) -> Response | ImagesResponse:
    """Generates images of the subject of `image`, sent as a form or as JSON. The whole image is generated, so there is
    no mask."""
    service.limit(owner)
    if media_of(request) != JSON:
        parsed, files = await read(request, ImageRequest, {"image": True})
        return await respond(service, owner, parsed, files["image"], request, EDIT)
    edit = await read_json(request, EditRequest)
    limit = service.settings.limits.upload_bytes
    data = await service.lanes.small.run(owner, from_base64, edit.source(), limit, "image")
    return await respond(service, owner, edit.without_image(), data, request, EDIT)


async def respond(
    service: Service,
    owner: str,
    parsed: JobRequest,
    data: bytes | None,
    request: Request,
    kind: str,
    mask: bytes | None = None,
) -> Response | ImagesResponse:
    """Makes the job of a request, with its reference and mask, and responds in the requested way."""
    service.student  # noqa: B018 (raises Busy while the model loads, before an image is decoded)
    kept = [
        None if sent is None else await service.keep_reference(owner, sent, parsed.matte()) for sent in (data, mask)
    ]
    job = await run_in_threadpool(service.submit, owner, parsed, *kept)
    if parsed.stream:
        stream = openai_events(service, owner, job["id"], parsed, kind)
        return StreamingResponse(stream, media_type="text/event-stream")
    if not parsed.wait:
        return JSONResponse(service.state(owner, job["id"]), 202)
    try:
        ended = await finished_job(service, owner, job["id"], request, keep=parsed.job is not None)
    except TimeoutError:
        return answer(504, f"The images took longer than {service.settings.limits.wait_seconds:g} s.")
    if ended is None:
        return Response(status_code=204)  # the client left, so nobody reads this
    return result(service, ended, parsed.response_format or "b64_json", request)


def failure(job: dict[str, Any]) -> tuple[str, str]:
    """Returns (message, code) of a job that failed or was cancelled."""
    return job["error"] or f"The job was {job['status']}.", job["request"].get("code", FAILED)


def result(service: Service, job: dict[str, Any], response_format: str, request: Request) -> Response | ImagesResponse:
    """Returns a job that has ended, in OpenAI's format."""
    if job["status"] != "done":
        return answer(400, *failure(job))
    items = []
    for made in job["pictures"]:
        item = ImageItem(id=made["id"], seed=made["seed"], warnings=warnings_of(job, made))
        if response_format == "url":
            item.url = address(service, made["id"], request)
        else:
            stored = service.store.picture(made["id"])
            item.b64_json = base64.b64encode(stored[2]).decode() if stored else None
        items.append(item)
    settings = {k: v for k, v in job["pictures"][0]["made_by"].items() if k not in ("prompt", "seed", "job")}
    size = f"{settings['width']}x{settings['height']}" if "width" in settings else None
    return ImagesResponse(
        created=int(job["finished"] or time.time()),
        data=items,
        output_format=job["request"]["output_format"],
        size=size,
        quality=job["request"].get("quality", "auto"),
        job=job["id"],
        settings=settings,
        warnings=warnings_of(job),
    )


def address(service: Service, picture: str, request: Request) -> str:
    """Returns a signed address of an image, which anyone can open for an hour."""
    return f"{request.base_url}v1/pictures/{picture}?{service.signer.sign(picture)}"


relight_router = APIRouter(prefix="/v1", tags=["relights and stories"])
RELIGHT_FILES = {"image": True, "mask": False}  # images of the form, and whether each is required
STORY_FILES = {"image": False}


@relight_router.post(
    "/relights",
    response_model=ImagesResponse,
    responses={**documented(415, 500, 504), **ACCEPTED},
    openapi_extra=described(RelightRequest, RELIGHT_FILES),
)
async def relights(request: Request, service: ServiceDep, owner: Owner) -> Response | ImagesResponse:
    """Relights the scene of `image` with each `light`, everything in its place. White in `mask` may change."""
    service.limit(owner)
    parsed, files = await read(request, RelightRequest, RELIGHT_FILES)
    return await respond(service, owner, parsed, files["image"], request, "relight", files["mask"])


@relight_router.post(
    "/stories",
    response_model=ImagesResponse,
    responses={**documented(415, 500, 504), **ACCEPTED},
    openapi_extra=described(StoryRequest, STORY_FILES),
)
async def stories(request: Request, service: ServiceDep, owner: Owner) -> Response | ImagesResponse:
    """Generates the panels of a story of the character in `image`. `/v1/jobs/ID/page` returns the laid-out page."""
    service.limit(owner)
    parsed, files = await read(request, StoryRequest, STORY_FILES)
    return await respond(service, owner, parsed, files["image"], request, "story")


def as_json(value: Any) -> str:
    """Returns compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


PULSE = 1.0  # seconds between checks of a job without changes


def event(name: str, data: Any) -> str:
    """Returns one server-sent event."""
    return f"event: {name}\ndata: {as_json(data)}\n\n"


async def finished_job(service: Service, owner: str, id: str, request: Request, keep: bool) -> dict[str, Any] | None:
    """Returns a job once it has ended; None if its client left.

    Busy if the server stops first, TimeoutError after `wait_seconds`. Unless `keep`, the job is cancelled when its
    client leaves or the time is over.
    """
    until = time.monotonic() + service.settings.limits.wait_seconds
    while True:
        job = service.store.job(owner, id)
        if job is None or not service.is_open(job):
            return job
        _check_stopping(service, job)
        gone = await request.is_disconnected()
        if gone or time.monotonic() > until:
            if not keep:
                service.cancel(owner, id)
            if gone:
                return None
            raise TimeoutError
        await service.board.changed(job["number"], PULSE)


def _check_stopping(service: Service, job: dict[str, Any]) -> None:
    """Raises Busy if the server stops and no image of the job is running."""
    if service.draining and all(picture["status"] != "running" for picture in job["pictures"]):
        raise Busy(f"The server is stopping. Job {job['id']} resumes when it starts again.", 5, 503)


async def openai_events(service: Service, owner: str, id: str, parsed: JobRequest, kind: str) -> AsyncIterator[str]:
    """Yields OpenAI's stream of a request: `image_generation.partial_image` and `image_generation.completed`, or
    `image_edit.…`; an `error` event if it fails."""
    shown: dict[int, bytes] = {}
    sent: dict[int, int] = {}
    complete: set[int] = set()
    while True:
        job = service.store.job(owner, id)
        if job is None:
            return
        common = {"created_at": int(job["created"]), "background": "opaque"}
        common |= {"quality": job["request"].get("quality", "auto")}
        live = service.board.live(job["number"])
        for place, png in sorted(live.previews.items()):
            due = parsed.partial_images * live.step // max(1, live.steps)
            if shown.get(place) is not png and sent.get(place, 0) < min(due, parsed.partial_images):
                shown[place], sent[place] = png, sent.get(place, 0) + 1
                yield event(f"{kind}.partial_image", _image(f"{kind}.partial_image", png, "png", common)
                    | {"partial_image_index": sent[place] - 1})  # fmt: skip
        for picture in job["pictures"]:
            if picture["status"] == "done" and picture["place"] not in complete:
                complete.add(picture["place"])
                stored = service.store.picture(picture["id"])
                assert stored is not None
                whole = _image(f"{kind}.completed", stored[2], parsed.output_format, common)
                nothing = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
                nothing["input_tokens_details"] = {"image_tokens": 0, "text_tokens": 0}  # pyright: ignore
                more = {"seed": picture["seed"], "job": id, "warnings": warnings_of(job, picture), "usage": nothing}
                yield event(f"{kind}.completed", {**whole, **more})
        if not service.is_open(job):
            if job["status"] != "done":
                yield event("error", {"type": "error", **body(*failure(job))})
            return
        try:
            _check_stopping(service, job)
        except Busy as busy:
            yield event("error", {"type": "error", **body(str(busy), busy.code)})
            return
        await service.board.changed(job["number"], PULSE)


def _image(name: str, data: bytes, output_format: str, common: dict[str, Any]) -> dict[str, Any]:
    width, height = Image.open(io.BytesIO(data)).size
    image = {"type": name, "b64_json": base64.b64encode(data).decode(), "output_format": output_format}
    return {**image, "size": f"{width}x{height}", **common}
