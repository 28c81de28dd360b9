"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`.

`code` is a code of `errors.yaml`: that of the `UserError` behind a response, or one for the status.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from diptych.errors import UserError, codes, nearest
from diptych.serve.database import FULL, FULL_STATUS, Unwritable
from diptych.serve.http.openapi import RequestField, media_of, of_route, of_schema, shown, words
from diptych.serve.limits import Refused
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
CODES = {
    401: "invalid_api_key",
    404: "job_not_found",
    409: "job_state",
    413: "file_too_large",
    429: "rate_limited",
    500: "internal",
    503: "server_busy",
    504: "job_timeout",
    FULL_STATUS: "storage_full",
}
ANYWHERE = (400, 401, 403, 404, 405, 408, 413, 421, 429, 503, FULL_STATUS)


class Fault(BaseModel):
    """An error: its message for people and its code for programs."""

    message: str
    type: str
    param: str | None = Field(None, description="The field or parameter that is wrong.")
    code: str = Field(
        description="Stable code of the error. `diptych` uses the same codes on the command line and in Python.",
        json_schema_extra=lambda schema: schema.update({"enum": [*sorted(codes())]}),
    )


class Error(BaseModel):
    """Body of an error response."""

    error: Fault


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the OpenAPI entries of these statuses, and of those that every route can give."""
    return {status: {"model": Error} for status in sorted({*statuses, *ANYWHERE})}


def _text(text: str) -> str:
    """Escapes halves of surrogate pairs, which a request may have and a response cannot."""
    return text.encode("utf8", "backslashreplace").decode("utf8")


def body(message: str, code: str, kind: str = "server_error", param: str | None = None) -> dict[str, Any]:
    """Returns the body of an error."""
    message, param = _text(message), None if param is None else _text(param)
    return Error(error=Fault(message=message, type=kind, param=param, code=code)).model_dump()


def answer(
    status: int, message: str, code: str | None = None, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """Returns an error as a response. The default code is that of the status."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = code or CODES.get(status, "request_invalid")
    return JSONResponse(body(message, code, kind, param), status, headers)


def of_error(error: UserError) -> JSONResponse:
    """Returns a `UserError` as a response with its code. A message that begins with `field: ` names the parameter."""
    status, seconds = (error.status, error.seconds) if isinstance(error, Refused) else (400, 0)
    name, colon, _ = str(error).partition(":")
    param = name if status in (400, 404) and colon and name.isidentifier() else None
    return answer(status, str(error), error.code, param, {"Retry-After": str(seconds)} if seconds else None)


def of_fields(errors: list[Any], fields: Sequence[RequestField]) -> JSONResponse:
    """Returns the most useful of pydantic's errors about a request with these fields."""
    # A misspelled required field is also missing; the misspelling says more.
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    if first["type"] == "json_invalid":
        return answer(400, f"The body is not valid JSON ({first['ctx']['error']}).", "json_invalid")
    place = _place(first)
    if not place:
        return answer(400, "The body must be a JSON object with the fields of this request.", "json_invalid")
    name = ".".join(map(str, place))
    if first["type"] == "extra_forbidden":
        hint = nearest(name, [field.name for field in fields])
        return answer(400, f"Unknown parameter '{name}'{hint}", "request_invalid", name)
    return answer(400, f"{name}: {wrong(first, fields)}", "request_invalid", name)


def wrong(error: Mapping[str, Any], fields: Sequence[RequestField]) -> str:
    """Returns what is wrong with a field: the allowed values, and the given one."""
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
    """The field's name and, in a list, the index. Pydantic also adds the type of a value that may have several."""
    inside = [part for part in error["loc"] if part not in ("body", "query", "path")]
    return inside[:1] + [part for part in inside[1:] if isinstance(part, int)]


def install(app: FastAPI) -> None:
    """Makes an app answer all errors in this format."""

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def _(request: Request, error: RequestValidationError | ValidationError) -> JSONResponse:
        path = getattr(request.scope.get("route"), "path_format", "")
        fields = of_route(request.app.openapi(), path, request.method, media_of(request))
        return of_fields(list(error.errors()), fields)

    @app.exception_handler(UserError)
    async def _(request: Request, error: UserError) -> JSONResponse:
        return of_error(error)

    @app.exception_handler(OSError)
    async def _(request: Request, error: OSError) -> JSONResponse:
        if error.errno not in FULL:
            raise error
        return of_error(Unwritable("The server's disk is full, so the request could not be held.", FULL_STATUS))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        code = "request_invalid" if error.status_code == 404 else None  # no such route
        return answer(error.status_code, str(error.detail), code, headers=dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def _(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # the client left while it sent, so nobody reads this

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s", request.method, request.url.path, exc_info=error)
        return answer(500, "Internal error. The server's log has the details.")
