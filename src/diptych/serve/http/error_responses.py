"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from diptych.errors import UserError, nearest
from diptych.serve.database import FULL, FULL_STATUS, Unwritable
from diptych.serve.http.openapi import Field, of_route, of_schema, shown, words
from diptych.serve.limits import Busy, OverQuota
from diptych.utils import documents

log = logging.getLogger("diptych.serve")
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
ANYWHERE = (400, 401, 403, 404, 405, 408, 413, 421, 429, 503, FULL_STATUS)
RETRY = 10  # seconds until a request that could not be stored is sent again


class Fault(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """An error's body."""

    error: Fault


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of these statuses, and of those that every route can give."""
    return {status: {"model": Error} for status in sorted({*statuses, *ANYWHERE})}


def _text(text: str) -> str:
    """Without halves of surrogate pairs, which a request may hold and no answer can."""
    return text.encode("utf8", "backslashreplace").decode("utf8")


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    message, param = _text(message), None if param is None else _text(param)
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return Error(error=Fault(message=message, type=kind, param=param, code=code)).model_dump()


def answer(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(body(status, message, param, code), status, headers)


def of_fields(errors: list[Any], fields: Sequence[Field]) -> JSONResponse:
    """The most telling of pydantic's findings about a request with these fields, in our words."""
    # A misspelt field that is needed is also missing: its misspelling says more.
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    if first["type"] == "json_invalid":
        return answer(400, f"the body is not valid JSON ({first['ctx']['error']})", code=first["type"])
    place = _place(first)
    if not place:
        return answer(400, "the body must be a JSON object with the fields of this request", code=first["type"])
    name = ".".join(map(str, place))
    if first["type"] == "extra_forbidden":
        known = [field.name for field in fields]
        return answer(400, f"unknown parameter '{name}'{nearest(name, known)}", name, "unknown_parameter")
    return answer(400, f"{name}: {wrong(first, fields)}", name, first["type"])


def wrong(error: Mapping[str, Any], fields: Sequence[Field]) -> str:
    """What is wrong with a field: what it may hold, and what it was given."""
    kind, place = error["type"], _place(error)
    field = next((field for field in fields if field.name == place[0]), None)
    if field is None or kind == "value_error" or kind.startswith(("string_too_", "too_")):
        return documents.explain(error)
    if kind == "missing":
        return f"missing; it must be {field.allowed}"
    allowed = field.allowed
    if len(place) > 1 and "items" in field.schema:
        allowed = of_schema({"properties": {field.name: field.schema["items"]}})[0].allowed
    hint = nearest(str(error["input"]), words(field.schema))
    return f"must be {allowed}, not {shown(error['input'])}{hint}"


def _place(error: Mapping[str, Any]) -> list[Any]:
    """The field's name, and where it is a list the place in it. Where a value may be of several types, pydantic adds
    the type."""
    inside = [part for part in error["loc"] if part not in ("body", "query", "path")]
    return inside[:1] + [part for part in inside[1:] if isinstance(part, int)]


def _fields(request: Request) -> list[Field]:
    """The fields of the route that a request came to."""
    route = request.scope.get("route")
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return of_route(request.app.openapi(), getattr(route, "path_format", ""), request.method, media)


def _unwritable(error: Unwritable) -> JSONResponse:
    code = "insufficient_storage" if error.status == FULL_STATUS else "unavailable"
    return answer(error.status, str(error), code=code, headers={"Retry-After": str(RETRY)})


def install(app: FastAPI) -> None:
    """Makes an app answer all its errors this way."""

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_fields(list(error.errors()), _fields(request))

    @app.exception_handler(ValidationError)
    async def _(request: Request, error: ValidationError) -> JSONResponse:
        return of_fields(list(error.errors()), _fields(request))

    @app.exception_handler(UserError)
    async def _(request: Request, error: UserError) -> JSONResponse:
        if isinstance(error, Busy):
            code = "busy" if error.status == 429 else "unavailable"
            return answer(error.status, str(error), code=code, headers={"Retry-After": str(error.seconds)})
        if isinstance(error, OverQuota):
            return answer(413, str(error), code="quota_exceeded")
        if isinstance(error, Unwritable):
            return _unwritable(error)
        name, colon, _ = str(error).partition(":")
        return answer(400, str(error), name if colon and name.isidentifier() else None)

    @app.exception_handler(OSError)
    async def _(request: Request, error: OSError) -> JSONResponse:
        if error.errno not in FULL:
            raise error
        return _unwritable(Unwritable("the disk of the server is full: the request could not be held", FULL_STATUS))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def _(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # while it was still sending; nobody is there to read this

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s", request.method, request.url.path, exc_info=error)
        return answer(500, "an error inside the server; its log says more")
