"""`/v1/jobs`, `/v1/references`, `/v1/pictures`, `/v1/models`: what was asked for, as it goes on and as it ended."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from pydantic import BaseModel

from diptych.apps import relight, story
from diptych.data.images import encode_png
from diptych.errors import UsageError
from diptych.serve import worker
from diptych.serve.http.error_responses import answer, documented
from diptych.serve.http.image_routes import PULSE, Owner, Pictures, ServiceDep, as_json, event, result
from diptych.serve.request_models import JOB_ID, JOB_WORDS, WORDS
from diptych.serve.service import Service

router = APIRouter(prefix="/v1", responses=documented(500))
JobId = Annotated[str, Path(pattern=JOB_ID, json_schema_extra={WORDS: JOB_WORDS})]
PictureId = Annotated[str, Path(pattern=r"^img_[A-Za-z0-9_-]{24}$", json_schema_extra={WORDS: "the id of a picture"})]
ReferenceId = Annotated[str, Path(pattern=r"^ref_[0-9a-f]{40}$", json_schema_extra={WORDS: "the id of a reference"})]
MEDIA = {"PNG": "image/png", "WEBP": "image/webp", "JPEG": "image/jpeg"}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
IMAGE: dict[int | str, dict[str, Any]] = {
    200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA.values()}}
}
BODY = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/png", "image/jpeg", "image/webp")}

KEEP_ALIVE = 15.0  # seconds between comments that keep a quiet stream open


class Progress(BaseModel):
    """Pictures done, of how many; steps of those being drawn."""

    done: int
    of: int
    step: int
    steps: int


class JobPicture(BaseModel):
    """One picture of a job: `text` is what it shows, `settings` come once it is drawn."""

    id: str
    text: str
    seed: int
    status: str
    settings: dict[str, Any] | None
    warnings: list[str] = []


class Job(BaseModel):
    """A job as it stands: queued, running, done, failed or cancelled; of the kind images, relight or story."""

    id: str
    object: str
    kind: str
    status: str
    created: int
    finished: int | None
    prompt: str
    pictures: list[JobPicture]
    progress: Progress
    warnings: list[str] = []
    error: str | None
    waiting_before: int | None = None


class Jobs(BaseModel):
    """The latest jobs, newest first."""

    object: str = "list"
    data: list[Job]


class Reference(BaseModel):
    """A reference that is kept, for a while."""

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


class Models(BaseModel):
    """A list of one."""

    object: str = "list"
    data: list[Model]


def _model(service: Service) -> Model:
    student = service.student
    words = sorted(student.words) if student.words is not None else None
    side = student.pipeline.default_panel_size
    return Model(id=student.name, size=side, sampling=student.sampling, words=words)


@router.get("/models", tags=["models"])
def models(service: ServiceDep) -> Models:
    """The model: its picture's side in pixels, its own settings, and, if it has one, the list of words it knows."""
    return Models(data=[_model(service)])


@router.get("/models/{id:path}", tags=["models"])
def model(id: Annotated[str, Path(max_length=500)], service: ServiceDep) -> Model:
    """The model by its name, as `/v1/models` gives it; 404 for any other."""
    found = _model(service)
    if id != found.id:
        said = f"there is no model '{id}' here; this server has '{found.id}'"
        return answer(404, said, "model", "model_not_found")  # pyright: ignore[reportReturnType]
    return found


@router.get("/jobs", tags=["jobs"])
def jobs(service: ServiceDep, owner: Owner, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Jobs:
    """Your latest jobs."""
    states = [service.state(owner, id) for id in service.store.jobs(owner, limit)]
    return Jobs(data=[Job(**state) for state in states if state is not None])


@router.get("/jobs/{id}", tags=["jobs"])
def job(id: JobId, service: ServiceDep, owner: Owner) -> Job:
    """A job and how far it is."""
    state = service.state(owner, id)
    if state is None:
        return _no_job()  # pyright: ignore[reportReturnType]
    return Job(**state)


@router.get("/jobs/{id}/events", tags=["jobs"], response_class=StreamingResponse, responses=STREAM)
async def events(id: JobId, service: ServiceDep, owner: Owner, previews: bool = False) -> Response:
    """Server-sent events: `progress`, with `previews` also `preview`; the last is `done`, `failed` or `cancelled`."""
    if service.store.job(owner, id) is None:
        return _no_job()
    return StreamingResponse(job_events(service, owner, id, previews), media_type="text/event-stream")


@router.get("/jobs/{id}/images", tags=["jobs"], response_model=Pictures, responses=documented(409, 500))
def job_images(
    id: JobId,
    request: Request,
    service: ServiceDep,
    owner: Owner,
    response_format: Literal["b64_json", "url"] = "b64_json",
) -> Response | Pictures:
    """A finished job's pictures, as `/v1/images/…` answers; 409 while it is not finished."""
    found = service.store.job(owner, id)
    if found is None:
        return _no_job()
    if service.is_open(found):
        return answer(409, f"the job is {found['status']}; its events tell when it is done")
    return result(service, found, response_format, request)


@router.delete("/jobs/{id}", tags=["jobs"], responses=documented(409, 500))
def cancel(id: JobId, service: ServiceDep, owner: Owner) -> Job:
    """Gives a job up: what waits is dropped, what is drawn alone stops at its next step."""
    stopped = service.cancel(owner, id)
    state = service.state(owner, id)
    if state is None:
        return _no_job()  # pyright: ignore[reportReturnType]
    if not stopped:
        return answer(409, f"the job is {state['status']} already")  # pyright: ignore[reportReturnType]
    return Job(**state)


@router.post(
    "/references",
    tags=["references"],
    status_code=201,
    response_model=Reference,
    openapi_extra={"requestBody": {"required": True, "content": BODY}},
)
async def add_reference(request: Request, service: ServiceDep, owner: Owner) -> Reference:
    """Keeps a picture, the body of the request, for the web app."""
    service.limit(owner)
    data = await request.body()
    return Reference(id=await service.keep_reference(owner, data))


@router.get("/references/{id}", tags=["references"], response_class=Response, responses=IMAGE)
def reference(id: ReferenceId, service: ServiceDep, owner: Owner) -> Response:
    """A reference of yours."""
    data = service.store.reference(owner, id)
    return answer(404, "there is no such reference") if data is None else Response(data, media_type="image/png")


@router.get("/pictures/{id}", tags=["pictures"], response_class=Response, responses=IMAGE)
def picture(
    id: PictureId,
    request: Request,
    service: ServiceDep,
    until: Annotated[int | None, Query(ge=0, lt=2**53)] = None,
    signature: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """A picture: for its owner, and for who has its signed address."""
    signed = until is not None and signature is not None and service.signer.fits(id, until, signature)
    owner = request.state.owner
    if not signed and owner is None:
        return answer(401, "this address is not signed, or no longer; a token opens it: Authorization: Bearer TOKEN")
    found = service.store.picture(id)
    if found is None or not (signed or found[0] == owner):
        return answer(404, "there is no such picture")
    headers = {"Cache-Control": "private, max-age=3600", "Content-Disposition": f'inline; filename="{id}"'}
    return Response(found[2], media_type=MEDIA[found[1]], headers=headers)


def _no_job() -> JSONResponse:
    return answer(404, "there is no such job")


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
    """A finished job on one page: a story's, as PNG or PDF; other pictures side by side, as PNG."""
    service.limit(owner, stores=False)
    job = service.store.job(owner, id)
    if job is None:
        return answer(404, "there is no such job")
    if job["status"] != "done":
        return answer(409, f"the job is {job['status']}; a page is made of one that is done")
    data = await service.lanes.large.run(owner, finished, service, job, kind)
    headers = {"Cache-Control": "private, max-age=600", "Content-Disposition": f'inline; filename="{id}.{kind}"'}
    return Response(data, media_type=PAGE_MEDIA[kind], headers=headers)


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


async def job_events(service: Service, owner: str, id: str, previews: bool) -> AsyncIterator[str]:
    """`progress` events with a job's state, each new preview if asked for, and at the end `done`, `failed` or
    `cancelled`; `stopping` if the server stops first."""
    last, shown, spoke = "", {}, time.monotonic()
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
            last, spoke = now, time.monotonic()
            yield event("progress", state)
        elif time.monotonic() - spoke > KEEP_ALIVE:
            spoke = time.monotonic()
            yield ": still here\n\n"
        if service.draining and all(picture["status"] != "running" for picture in job["pictures"]):
            yield event("stopping", state)
            return
        await service.board.changed(job["number"], PULSE)
