"""`/v1/images/generations` and `/v1/images/edits`, in OpenAI's format: the official client works unchanged.

The first takes JSON, and with our field `reference` (base64) the picture of a subject too; the second takes a form with
the picture as `image`, or JSON with it as base64. Both make a job and wait for it; `wait=false` answers at once,
`stream=true` as it goes on.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from diptych.errors import UsageError
from diptych.serve.http import events
from diptych.serve.http.error_responses import answer, documented
from diptych.serve.request_models import EditRequest, GenerationRequest, ImageRequest, JobRequest
from diptych.serve.service import Service, from_base64, warnings_of
from diptych.utils.documents import parse_request

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


# Requests that bring pictures: forms (multipart/form-data), read into one of the models of `asked`. `files` says
# which pictures a form has, and whether each must be there. A list in the model is a field that is repeated.

MOST_FIELDS = 60
FORM = "multipart/form-data"
JSON = "application/json"
PICTURES = {
    "image": "The picture of your subject: PNG, JPEG, WebP, …",
    "mask": "Of the picture's size: white may change, black stays.",
}
MASKLESS = "; the whole picture is drawn anew, so a mask has no meaning here"
Wanted = TypeVar("Wanted", bound=JobRequest)


async def read(request: Request, model: type[Wanted], files: Mapping[str, bool]) -> tuple[Wanted, dict[str, Any]]:
    """What a form asks for, and the bytes of each picture, None for one that is not there.

    UsageError or pydantic's ValidationError for what is not as it should be; 415 for what is no form.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM:
        raise HTTPException(415, f"send a form ({FORM}) with {' and '.join(_required(model, files))}")
    lists = [name for name, field in _fields(model).items() if "items" in field]
    async with request.form(max_files=4, max_fields=MOST_FIELDS, max_part_size=2**18) as form:
        given: dict[str, Any] = {}
        sent: dict[str, list[UploadFile]] = {name: [] for name in files}
        for key, value in form.multi_items():
            name = key.removesuffix("[]") if key.removesuffix("[]") in (*files, *lists) else key
            if isinstance(value, UploadFile):
                if name not in files:
                    hint = MASKLESS if name == "mask" else ""
                    raise UsageError(f"{name[:40]}: no such picture can be sent here, only {', '.join(files)}{hint}")
                sent[name].append(value)
            elif name in files:
                raise UsageError(f"{name}: send the picture itself, as a file")
            elif name in lists:
                given.setdefault(name, []).append(value)
            elif name in given:
                raise UsageError(f"{name[:40]}: given twice")
            else:
                given[name] = value
        asked = model.model_validate(given)
        for name, needed in files.items():
            if len(sent[name]) > 1 or (needed and not sent[name]):
                raise UsageError(f"{name}: send one picture, not {len(sent[name])}")
        return asked, {name: await found[0].read() if found else None for name, found in sent.items()}


async def read_json(request: Request, model: type[Wanted]) -> Wanted:
    """What a JSON body asks for. UsageError if it is not such JSON as is taken, pydantic's ValidationError if it is
    wrong."""
    if not is_json(request):
        raise UsageError(f"the body must be a JSON object with the fields of this request, sent as {JSON}")
    body = await request.body()
    try:
        given = parse_request(body)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"the body is not valid JSON ({error})") from None
    return model.model_validate(given)


def is_json(request: Request) -> bool:
    """Whether a request says that its body is JSON."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == JSON


def described(
    model: type[JobRequest], files: Mapping[str, bool], as_json: type[JobRequest] | None = None
) -> dict[str, Any]:
    """The OpenAPI entry of such a request's body; `as_json` describes the body of one that may also be JSON."""
    pictures = {name: {"type": "string", "format": "binary", "description": PICTURES[name]} for name in files}
    schema = {**model.model_json_schema(), "properties": {**_fields(model), **pictures}}
    schema["required"] = _required(model, files)
    content = {FORM: {"schema": schema}} | ({JSON: {"schema": as_json.model_json_schema()}} if as_json else {})
    return {"requestBody": {"required": True, "content": content}}


def described_json(model: type[JobRequest]) -> dict[str, Any]:
    """The OpenAPI entry of a body that is JSON alone."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": model.model_json_schema()}}}}


def _fields(model: type[JobRequest]) -> dict[str, Any]:
    """The model's fields as JSON schema, without null: a form leaves a field out instead."""
    fields = {}
    for name, field in model.model_json_schema()["properties"].items():
        kinds = [kind for kind in field.get("anyOf", []) if kind != {"type": "null"}]
        plain = {key: value for key, value in field.items() if key != "anyOf"}
        fields[name] = plain | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})
    return fields


def _required(model: type[JobRequest], files: Mapping[str, bool]) -> list[str]:
    needed = [name for name, field in model.model_fields.items() if field.is_required()]
    return [*needed, *(name for name, must in files.items() if must)]


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
        told = events.openai_events(service, owner, job["id"], asked, kind)
        return StreamingResponse(told, media_type="text/event-stream")
    if not asked.wait:
        return JSONResponse(service.state(owner, job["id"]), 202)
    try:
        ended = await events.finished_job(service, owner, job["id"], request, keep=asked.job is not None)
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
