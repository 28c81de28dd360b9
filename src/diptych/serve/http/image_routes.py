"""`/v1/images/generations` and `/v1/images/edits` in OpenAI's format, so that the official client works unchanged, and
`/v1/relights` and `/v1/stories`, which OpenAI has no route for, asked and answered alike.

Generations take JSON, and with our field `reference` (base64) the picture of a subject too; the others take a form with
the picture as `image`, edits also JSON with it as base64. Each makes a job and waits for it; `wait=false` answers at
once, `stream=true` as it goes on, in OpenAI's server-sent events.
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

from diptych.serve.http.error_responses import answer, documented
from diptych.serve.http.openapi import described, described_json, from_base64, is_json, read, read_json
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


class Picture(BaseModel):
    """One picture of an answer."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int
    id: str
    warnings: list[str] = []


class Pictures(BaseModel):
    """An answer: OpenAI's, and what made the pictures."""

    created: int
    data: list[Picture]
    output_format: str
    size: str | None = None
    background: str = "opaque"
    quality: str = "auto"
    job: str
    settings: dict[str, Any]
    warnings: list[str] = []


def service_of(request: Request) -> Service:
    """The service of the app that a request came to."""
    return request.app.state.service


def owner_of(request: Request) -> str:
    """Whose a request is; the guard has put it there."""
    return request.state.owner


Owner = Annotated[str, Depends(owner_of)]
ServiceDep = Annotated[Service, Depends(service_of)]
router = APIRouter(prefix="/v1/images", tags=["images"], responses=documented(500, 504))
ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"description": "With `wait` false: the job.", "model": dict[str, Any]}
}


@router.post(
    "/generations", response_model=Pictures, responses=ACCEPTED, openapi_extra=described_json(GenerationRequest)
)
async def generations(request: Request, service: ServiceDep, owner: Owner) -> Response | Pictures:
    """Draws pictures from a prompt and, with `reference`, of its subject. Without one, from the text alone."""
    service.limit(owner)  # before the body is read
    asked = await read_json(request, GenerationRequest)
    data = None
    if asked.reference is not None:
        limit = service.settings.limits.upload_bytes
        data = await service.lanes.small.run(owner, from_base64, asked.reference, limit)
    return await draw(
        service, owner, ImageRequest(**asked.model_dump(exclude={"reference"})), data, request, GENERATION
    )


@router.post(
    "/edits",
    response_model=Pictures,
    responses={**documented(415), **ACCEPTED},
    openapi_extra=described(ImageRequest, {"image": True}, EditRequest),
)
async def edits(request: Request, service: ServiceDep, owner: Owner) -> Response | Pictures:
    """Draws the subject of `image` as the prompt asks, sent as a form or as JSON. The whole picture is new, so a mask
    has no meaning here."""
    service.limit(owner)
    if not is_json(request):
        asked, files = await read(request, ImageRequest, {"image": True})
        return await draw(service, owner, asked, files["image"], request, EDIT)
    edit = await read_json(request, EditRequest)
    limit = service.settings.limits.upload_bytes
    data = await service.lanes.small.run(owner, from_base64, edit.source(), limit, "image")
    return await draw(service, owner, edit.asked(), data, request, EDIT)


async def draw(
    service: Service,
    owner: str,
    asked: JobRequest,
    data: bytes | None,
    request: Request,
    kind: str,
    mask: bytes | None = None,
) -> Response | Pictures:
    """Makes the job, with a reference and a mask as they were sent, and answers in the way that was asked for."""

    service.student  # noqa: B018 (Busy while there is none, before a picture is decoded)
    kept = [
        None if sent is None else await service.keep_reference(owner, sent, asked.colour()) for sent in (data, mask)
    ]
    job = await run_in_threadpool(service.submit, owner, asked, *kept)
    if asked.stream:
        told = openai_events(service, owner, job["id"], asked, kind)
        return StreamingResponse(told, media_type="text/event-stream")
    if not asked.wait:
        return JSONResponse(service.state(owner, job["id"]), 202)
    try:
        ended = await finished_job(service, owner, job["id"], request, keep=asked.job is not None)
    except TimeoutError:
        return answer(504, f"the pictures took longer than {service.settings.limits.wait_seconds:g} s", code="timeout")
    if ended is None:
        return Response(status_code=204)  # nobody is there to read it
    return result(service, ended, asked.response_format or "b64_json", request)


def result(service: Service, job: dict[str, Any], response_format: str, request: Request) -> Response | Pictures:
    """A job that has ended, as OpenAI answers."""
    if job["status"] != "done":
        failed = job["status"] == "failed"
        message = job["error"] if failed else "the job was cancelled"
        return answer(400, message, code="failed" if failed else "cancelled")
    pictures = []
    for made in job["pictures"]:
        picture = Picture(id=made["id"], seed=made["seed"], warnings=warnings_of(job, made))
        if response_format == "url":
            picture.url = address(service, made["id"], request)
        else:
            found = service.store.picture(made["id"])
            picture.b64_json = base64.b64encode(found[2]).decode() if found else None
        pictures.append(picture)
    settings = {k: v for k, v in job["pictures"][0]["made_by"].items() if k not in ("prompt", "seed", "job")}
    size = f"{settings['width']}x{settings['height']}" if "width" in settings else None
    return Pictures(
        created=int(job["finished"] or time.time()),
        data=pictures,
        output_format=job["request"]["output_format"],
        size=size,
        quality=job["request"].get("quality", "auto"),
        job=job["id"],
        settings=settings,
        warnings=warnings_of(job),
    )


def address(service: Service, picture: str, request: Request) -> str:
    """Where a picture can be fetched for an hour, by whoever has the address."""
    return f"{request.base_url}v1/pictures/{picture}?{service.signer.sign(picture)}"


relight_router = APIRouter(prefix="/v1", tags=["relights and stories"])
RELIGHT_FILES = {"image": True, "mask": False}  # whether a form must have each
STORY_FILES = {"image": False}


@relight_router.post(
    "/relights",
    response_model=Pictures,
    responses={**documented(415, 500, 504), **ACCEPTED},
    openapi_extra=described(RelightRequest, RELIGHT_FILES),
)
async def relights(request: Request, service: ServiceDep, owner: Owner) -> Response | Pictures:
    """The scene of `image` under each `light`, everything in its place; a `mask` says what may change."""
    service.limit(owner)
    asked, files = await read(request, RelightRequest, RELIGHT_FILES)
    return await draw(service, owner, asked, files["image"], request, "relight", files["mask"])


@relight_router.post(
    "/stories",
    response_model=Pictures,
    responses={**documented(415, 500, 504), **ACCEPTED},
    openapi_extra=described(StoryRequest, STORY_FILES),
)
async def stories(request: Request, service: ServiceDep, owner: Owner) -> Response | Pictures:
    """Draws the panels of a story of the character in `image`; `/v1/jobs/ID/page` is then the laid-out page."""
    service.limit(owner)
    asked, files = await read(request, StoryRequest, STORY_FILES)
    return await draw(service, owner, asked, files["image"], request, "story")


def as_json(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


PULSE = 1.0  # seconds between looks when nothing happens


def event(name: str, data: Any) -> str:
    """One server-sent event."""
    return f"event: {name}\ndata: {as_json(data)}\n\n"


async def finished_job(service: Service, owner: str, id: str, request: Request, keep: bool) -> dict[str, Any] | None:
    """A job once it has ended; None if its client left. Then it is given up too, unless `keep`.

    Busy if the server stops first, TimeoutError after `wait_seconds`, with the job given up unless `keep`.
    """
    until = time.monotonic() + service.settings.limits.wait_seconds
    while True:
        job = service.store.job(owner, id)
        if job is None or not service.is_open(job):
            return job
        _refuse_if_stopping(service, job)
        gone = await request.is_disconnected()
        if gone or time.monotonic() > until:
            if not keep:
                service.cancel(owner, id)
            if gone:
                return None
            raise TimeoutError
        await service.board.changed(job["number"], PULSE)


def _refuse_if_stopping(service: Service, job: dict[str, Any]) -> None:
    if service.draining and all(picture["status"] != "running" for picture in job["pictures"]):
        raise Busy(f"the server is stopping; job {job['id']} goes on when it starts again", 5, 503)


async def openai_events(service: Service, owner: str, id: str, asked: JobRequest, kind: str) -> AsyncIterator[str]:
    """OpenAI's stream of a request: `image_generation.partial_image` and `image_generation.completed`, or
    `image_edit.…`; an `error` event if it fails."""
    shown: dict[int, bytes] = {}
    sent: dict[int, int] = {}
    complete: set[int] = set()
    while True:
        job = service.store.job(owner, id)
        if job is None:
            return
        told = {"created_at": int(job["created"]), "background": "opaque"}
        told |= {"quality": job["request"].get("quality", "auto")}
        live = service.board.live(job["number"])
        for place, png in sorted(live.previews.items()):
            due = asked.partial_images * live.step // max(1, live.steps)
            if shown.get(place) is not png and sent.get(place, 0) < min(due, asked.partial_images):
                shown[place], sent[place] = png, sent.get(place, 0) + 1
                yield event(f"{kind}.partial_image", _image(f"{kind}.partial_image", png, "png", told)
                    | {"partial_image_index": sent[place] - 1})  # fmt: skip
        for picture in job["pictures"]:
            if picture["status"] == "done" and picture["place"] not in complete:
                complete.add(picture["place"])
                found = service.store.picture(picture["id"])
                assert found is not None
                whole = _image(f"{kind}.completed", found[2], asked.output_format, told)
                nothing = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
                nothing["input_tokens_details"] = {"image_tokens": 0, "text_tokens": 0}  # pyright: ignore
                more = {"seed": picture["seed"], "job": id, "warnings": warnings_of(job, picture), "usage": nothing}
                yield event(f"{kind}.completed", {**whole, **more})
        if not service.is_open(job):
            if job["status"] != "done":
                message = job["error"] or f"the job was {job['status']}"
                yield event("error", {"type": "error", "error": {"message": message, "type": "server_error"}})
            return
        try:
            _refuse_if_stopping(service, job)
        except Busy as busy:
            yield event("error", {"type": "error", "error": {"message": str(busy), "type": "server_error"}})
            return
        await service.board.changed(job["number"], PULSE)


def _image(name: str, data: bytes, output_format: str, told: dict[str, Any]) -> dict[str, Any]:

    width, height = Image.open(io.BytesIO(data)).size
    image = {"type": name, "b64_json": base64.b64encode(data).decode(), "output_format": output_format}
    return {**image, "size": f"{width}x{height}", **told}
