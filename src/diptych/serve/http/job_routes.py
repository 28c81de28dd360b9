"""`/v1/jobs`, `/v1/references`, `/v1/pictures`, `/v1/models`: jobs with their progress and results."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response, StreamingResponse
from PIL import Image
from pydantic import BaseModel

from diptych.apps import relight, story
from diptych.data.images import encode_png
from diptych.errors import UsageError
from diptych.serve import worker
from diptych.serve.http.error_responses import documented
from diptych.serve.http.image_routes import PULSE, ImagesResponse, Owner, ServiceDep, as_json, event, result
from diptych.serve.limits import Refused
from diptych.serve.request_models import JOB_ID, JOB_WORDS, WORDS
from diptych.serve.service import Service

Known = TypeVar("Known")
router = APIRouter(prefix="/v1", responses=documented(500))
JobId = Annotated[str, Path(pattern=JOB_ID, json_schema_extra={WORDS: JOB_WORDS})]
PictureId = Annotated[str, Path(pattern=r"^img_[A-Za-z0-9_-]{24}$", json_schema_extra={WORDS: "the id of an image"})]
ReferenceId = Annotated[str, Path(pattern=r"^ref_[0-9a-f]{40}$", json_schema_extra={WORDS: "the id of a reference"})]
MEDIA = {"PNG": "image/png", "WEBP": "image/webp", "JPEG": "image/jpeg"}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
IMAGE: dict[int | str, dict[str, Any]] = {
    200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA.values()}}
}
BODY = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/png", "image/jpeg", "image/webp")}

KEEP_ALIVE = 15.0  # seconds between comments that keep an idle stream open


class Progress(BaseModel):
    """Finished images (`done`) of all (`of`), and steps of the running ones."""

    done: int
    of: int
    step: int
    steps: int


class JobImage(BaseModel):
    """One image of a job. `text` is its prompt, light or panel; `settings` are set once it is generated."""

    id: str
    text: str
    seed: int
    status: str
    settings: dict[str, Any] | None
    warnings: list[str] = []


class JobResponse(BaseModel):
    """State of a job. `status` is queued, running, done, failed or cancelled; `kind` is images, relight or story.

    `code` is the stable code of a failed job's error.
    """

    id: str
    object: str
    kind: str
    status: str
    created: int
    finished: int | None
    prompt: str
    pictures: list[JobImage]
    progress: Progress
    warnings: list[str] = []
    error: str | None
    code: str | None = None
    waiting_before: int | None = None


class JobList(BaseModel):
    """The latest jobs, newest first."""

    object: str = "list"
    data: list[JobResponse]


class ReferenceResponse(BaseModel):
    """A stored reference."""

    id: str
    object: str = "reference"


class Model(BaseModel):
    """The one model of this server."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "diptych"
    size: int
    sampling: dict[str, float]
    words: list[str] | None


class ModelList(BaseModel):
    """The list of this server's one model."""

    object: str = "list"
    data: list[Model]


def _model(service: Service) -> Model:
    student = service.student
    words = sorted(student.words) if student.words is not None else None
    side = student.pipeline.default_panel_size
    return Model(id=student.name, size=side, sampling=student.sampling, words=words)


@router.get("/models", tags=["models"])
def models(service: ServiceDep) -> ModelList:
    """Returns the model: its image side in pixels, its default settings, and its vocabulary if that is limited."""
    return ModelList(data=[_model(service)])


@router.get("/models/{id:path}", tags=["models"])
def model(id: Annotated[str, Path(max_length=500)], service: ServiceDep) -> Model:
    """Returns the model by its name in `/v1/models`."""
    known = _model(service)
    if id != known.id:
        raise Refused("model_not_found", f"model: this server has '{known.id}', not '{id}'", 404)
    return known


@router.get("/jobs", tags=["jobs"])
def jobs(service: ServiceDep, owner: Owner, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> JobList:
    """Returns your latest jobs."""
    states = [service.state(owner, id) for id in service.store.jobs(owner, limit)]
    return JobList(data=[JobResponse(**state) for state in states if state is not None])


@router.get("/jobs/{id}", tags=["jobs"])
def job(id: JobId, service: ServiceDep, owner: Owner) -> JobResponse:
    """Returns a job and its progress."""
    return JobResponse(**_known(service.state(owner, id)))


@router.get("/jobs/{id}/events", tags=["jobs"], response_class=StreamingResponse, responses=STREAM)
async def events(id: JobId, service: ServiceDep, owner: Owner, previews: bool = False) -> Response:
    """Streams server-sent events: `progress`, with `previews` also `preview`, and at the end `done`, `failed` or
    `cancelled`."""
    _known(service.store.job(owner, id))
    return StreamingResponse(job_events(service, owner, id, previews), media_type="text/event-stream")


@router.get("/jobs/{id}/images", tags=["jobs"], response_model=ImagesResponse, responses=documented(409, 500))
def job_images(
    id: JobId,
    request: Request,
    service: ServiceDep,
    owner: Owner,
    response_format: Literal["b64_json", "url"] = "b64_json",
) -> Response | ImagesResponse:
    """Returns a finished job's images in the format of `/v1/images/…`; 409 while it is not finished."""
    job = _known(service.store.job(owner, id))
    if service.is_open(job):
        raise Refused("job_state", f"The job is {job['status']}. Its events report when it is done.", 409)
    return result(service, job, response_format, request)


@router.delete("/jobs/{id}", tags=["jobs"], responses=documented(409, 500))
def cancel(id: JobId, service: ServiceDep, owner: Owner) -> JobResponse:
    """Cancels a job. Queued images are dropped; an image that is generated alone stops at its next step."""
    stopped = service.cancel(owner, id)
    state = _known(service.state(owner, id))
    if not stopped:
        raise Refused("job_state", f"The job is already {state['status']}.", 409)
    return JobResponse(**state)


@router.post(
    "/references",
    tags=["references"],
    status_code=201,
    response_model=ReferenceResponse,
    openapi_extra={"requestBody": {"required": True, "content": BODY}},
)
async def add_reference(request: Request, service: ServiceDep, owner: Owner) -> ReferenceResponse:
    """Stores an image, the body of the request, for the web app."""
    service.limit(owner)
    data = await request.body()
    return ReferenceResponse(id=await service.keep_reference(owner, data))


@router.get("/references/{id}", tags=["references"], response_class=Response, responses=IMAGE)
def reference(id: ReferenceId, service: ServiceDep, owner: Owner) -> Response:
    """Returns one of your references."""
    return Response(_known(service.store.reference(owner, id), "reference"), media_type="image/png")


@router.get("/pictures/{id}", tags=["pictures"], response_class=Response, responses=IMAGE)
def picture(
    id: PictureId,
    request: Request,
    service: ServiceDep,
    until: Annotated[int | None, Query(ge=0, lt=2**53)] = None,
    signature: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """Returns an image, to its owner or to a client with its signed address."""
    signed = until is not None and signature is not None and service.signer.fits(id, until, signature)
    owner = request.state.owner
    if not signed and owner is None:
        raise Refused(
            "invalid_api_key", "The address is not signed, or expired. Send Authorization: Bearer TOKEN.", 401
        )
    stored = service.store.picture(id)
    stored = _known(stored if stored is not None and (signed or stored[0] == owner) else None, "image")
    headers = {"Cache-Control": "private, max-age=3600", "Content-Disposition": f'inline; filename="{id}"'}
    return Response(stored[2], media_type=MEDIA[stored[1]], headers=headers)


def _known(value: Known | None, what: str = "job") -> Known:
    if value is None:
        raise Refused("job_not_found", f"No {what} of yours has this id, or it has expired.", 404)
    return value


PAGE_MEDIA = {"png": "image/png", "pdf": "application/pdf"}
PAGES: dict[int | str, dict[str, Any]] = {
    200: {"content": {media: {"schema": {"type": "string", "format": "binary"}} for media in PAGE_MEDIA.values()}}
}


@router.get(
    "/jobs/{id}/page",
    tags=["relights and stories"],
    response_class=Response,
    responses={**PAGES, **documented(409, 500)},
)
async def page(
    id: JobId,
    service: ServiceDep,
    owner: Owner,
    kind: Annotated[Literal["png", "pdf"], Query(alias="format")] = "png",
) -> Response:
    """Returns a finished job on one page: a story as PNG or PDF, other images side by side as PNG."""
    service.limit(owner, stores=False)
    job = _known(service.store.job(owner, id))
    if job["status"] != "done":
        raise Refused("job_state", f"The job is {job['status']}. Only a finished job has a page.", 409)
    data = await service.lanes.large.run(owner, finished, service, job, kind)
    headers = {"Cache-Control": "private, max-age=600", "Content-Disposition": f'inline; filename="{id}.{kind}"'}
    return Response(data, media_type=PAGE_MEDIA[kind], headers=headers)


def finished(service: Service, job: dict[str, Any], kind: str) -> bytes:
    """Returns the page as `png`, or a story's as `pdf`. UsageError for the PDF of another kind of job."""
    request, made_by = job["request"], job["pictures"][0]["made_by"]
    if kind == "pdf" and request["kind"] != "story":
        raise UsageError("request_invalid", "format: only a story has a PDF; use png for this job")
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in service.store.images(job["number"])]
    if request["kind"] != "story":
        return encode_png(_marked(service, relight.strip(images)), made_by)
    panels = [story.read_panel(line) for line in request["panels"]]
    seeds = [picture["seed"] for picture in job["pictures"]]
    bound = story.bind(images, panels, seeds, made_by, title=request["title"], captions=request["captions"])
    bound.page = _marked(service, bound.page)
    return bound.pdf() if kind == "pdf" else encode_png(bound.page, bound.provenance)


def _marked(service: Service, image: Image.Image) -> Image.Image:
    """Adds the watermark, if the server has one: enlarging lost those of the panels."""
    key = service.settings.watermark
    return image if key is None else worker.mark(image, key)


async def job_events(service: Service, owner: str, id: str, previews: bool) -> AsyncIterator[str]:
    """Yields `progress` events with a job's state, with `previews` each new preview, and at the end `done`, `failed` or
    `cancelled`; `stopping` if the server stops first."""
    last, shown, sent = "", {}, time.monotonic()
    while True:
        state = service.state(owner, id)
        if state is None:
            return
        if not service.is_open(state):
            yield event(state["status"], state)
            return
        job = service.store.job(owner, id)
        assert job is not None
        if previews:
            for place, png in sorted(service.board.live(job["number"]).previews.items()):
                if shown.get(place) is not png:
                    shown[place] = png
                    yield event("preview", {"picture": place, "b64_json": base64.b64encode(png).decode()})
        if (now := as_json(state)) != last:
            last, sent = now, time.monotonic()
            yield event("progress", state)
        elif time.monotonic() - sent > KEEP_ALIVE:
            sent = time.monotonic()
            yield ": keep-alive\n\n"
        if service.draining and all(picture["status"] != "running" for picture in job["pictures"]):
            yield event("stopping", state)
            return
        await service.board.changed(job["number"], PULSE)
