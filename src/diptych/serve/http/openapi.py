"""Request bodies and the API's schema.

`of_route` describes the fields of a route in words, from the schema: for the pages of `/docs` and for errors. `read`
parses a form (multipart/form-data) and `read_json` a JSON body into a model of `request_models`; `described` and
`described_json` are their entries in the schema. `files` maps the images of a form to whether each is required. A list
in the model is a repeated field of the form.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from diptych.errors import UsageError, UserError
from diptych.serve.config import Limits
from diptych.serve.request_models import WORDS, JobRequest
from diptych.utils import documents
from diptych.utils.documents import parse_request

PLAIN = {"boolean": "true or false", "object": "a JSON object", "null": "null"}


@dataclass(frozen=True)
class RequestField:
    """A field of a request with its schema and description."""

    name: str
    schema: Mapping[str, Any]
    required: bool
    where: str  # path, query or body
    description: str

    @property
    def allowed(self) -> str:
        """Type and range in words."""
        return allowed(self.schema)

    @property
    def default(self) -> str:
        """Default as JSON, empty if there is none."""
        return "" if self.schema.get("default") is None else json.dumps(self.schema["default"])

    @property
    def example(self) -> str:
        """Example as JSON, empty if there is none."""
        return json.dumps(self.schema["examples"][0]) if self.schema.get("examples") else ""


def of_route(schema: Mapping[str, Any], path: str, method: str, media: str = "") -> list[RequestField]:
    """Returns the fields of a route of an OpenAPI description, each name once; empty for an unknown route.

    For a body with several media types, only the fields of `media` are returned, if it is one of them.
    """
    route = schema["paths"].get(path, {}).get(method.lower(), {})
    fields = [
        RequestField(p["name"], p["schema"], p.get("required", False), p["in"], p.get("description", ""))
        for p in route.get("parameters", [])
    ]
    contents = route.get("requestBody", {}).get("content", {})
    for content in [contents[media]] if media in contents else contents.values():
        body = content.get("schema", {})
        if "$ref" in body:
            body = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
        fields += of_schema(body)
    return list({field.name: field for field in reversed(fields)}.values())[::-1]


def of_schema(body: Mapping[str, Any]) -> list[RequestField]:
    """Returns the fields of an object's JSON schema."""
    needed = body.get("required", ())
    return [
        RequestField(name, field, name in needed, "body", field.get("description", ""))
        for name, field in body.get("properties", {}).items()
    ]


def allowed(schema: Mapping[str, Any]) -> str:
    """Returns the allowed values as a noun phrase: `a whole number from 1 to 100`."""
    if WORDS in schema:
        return schema[WORDS]
    if kinds := [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]:
        return " or ".join(allowed(kind) for kind in kinds)
    if "enum" in schema or "const" in schema:
        values = [str(value) for value in schema.get("enum", [schema.get("const")])]
        return " or ".join(filter(None, (", ".join(values[:-1]), values[-1])))
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return f"a {'whole ' if kind == 'integer' else ''}number{_range(schema)}"
    if kind == "string":
        if schema.get("format") == "binary":
            return "an image file"
        most, form = schema.get("maxLength"), schema.get("pattern")
        text = "text" + (f" of at most {most:,} characters" if most and not form else "")
        return f"{text} of the form {form}" if form else text
    if kind == "array":
        items = f"a list of {_counts(schema)}values" if schema.get("items") else "a list"
        return f"{items}, each {allowed(schema['items'])}" if schema.get("items") else items
    return PLAIN.get(str(kind), "a value")


def words(schema: Mapping[str, Any]) -> list[str]:
    """Returns the values of an enumeration."""
    kinds = [schema, *schema.get("anyOf", ())]
    return [str(value) for kind in kinds for value in kind.get("enum", ())]


def _range(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if "exclusiveMaximum" in schema:
        high = schema["exclusiveMaximum"] - 1 if schema["type"] == "integer" else schema["exclusiveMaximum"]
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}" if high < 10**6 else f" from {low:g} on"
    return f" of at least {low:g}" if low is not None else f" of at most {high:g}" if high is not None else ""


def _counts(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minItems"), schema.get("maxItems")
    return f"{low or 0} to {high} " if high is not None else f"at least {low} " if low else ""


def shown(value: Any, limit: int = 60) -> str:
    """Returns a wrong value as JSON, cut to `limit` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[:limit]}…"


MAX_FIELDS = 60
FORM = "multipart/form-data"
JSON = "application/json"
IMAGES = {
    "image": "Image of your subject: PNG, JPEG, WebP, …",
    "mask": "Mask of the image's size: white may change, black stays.",
}
MASKLESS = "; the whole image is generated, so a mask has no meaning here"
Parsed = TypeVar("Parsed", bound=JobRequest)


async def read(request: Request, model: type[Parsed], files: Mapping[str, bool]) -> tuple[Parsed, dict[str, Any]]:
    """Parses a form. Returns the request and the bytes of each image, None for a missing one.

    UsageError or pydantic's ValidationError for invalid fields; status 415 for a body that is not a form.
    """
    if media_of(request) != FORM:
        raise HTTPException(415, f"Send a form ({FORM}) with {' and '.join(_required(model, files))}.")
    lists = [name for name, field in _fields(model).items() if "items" in field]
    async with request.form(max_files=4, max_fields=MAX_FIELDS, max_part_size=2**18) as form:
        given: dict[str, Any] = {}
        sent: dict[str, list[UploadFile]] = {name: [] for name in files}
        takes = ", ".join(files)
        for key, value in form.multi_items():
            name = key.removesuffix("[]") if key.removesuffix("[]") in (*files, *lists) else key
            if isinstance(value, UploadFile):
                if name not in files:
                    hint = MASKLESS if name == "mask" else ""
                    raise UsageError("request_invalid", f"{name[:40]}: this request takes {takes}{hint}")
                sent[name].append(value)
            elif name in files:
                raise UsageError("request_invalid", f"{name}: send the image as a file")
            elif name in lists:
                given.setdefault(name, []).append(value)
            elif name in given:
                raise UsageError("request_invalid", f"{name[:40]}: given twice")
            else:
                given[name] = value
        parsed = model.model_validate(given)
        for name, needed in files.items():
            if len(sent[name]) > 1 or (needed and not sent[name]):
                raise UsageError("request_invalid", f"{name}: send one image, not {len(sent[name])}")
        return parsed, {name: await uploads[0].read() if uploads else None for name, uploads in sent.items()}


async def read_json(request: Request, model: type[Parsed]) -> Parsed:
    """Parses a JSON body. UsageError if it is not valid JSON, pydantic's ValidationError for invalid fields."""
    if media_of(request) != JSON:
        raise UsageError("json_invalid", f"The body must be a JSON object with the request's fields, sent as {JSON}.")
    body = await request.body()
    try:
        values = parse_request(body)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError("json_invalid", f"The body is not valid JSON ({error}).") from None
    return model.model_validate(values)


def media_of(request: Request) -> str:
    """Returns the media type of a request's body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def described(
    model: type[JobRequest], files: Mapping[str, bool], as_json: type[JobRequest] | None = None
) -> dict[str, Any]:
    """Returns the OpenAPI entry of a form; `as_json` is the model of a body that may also be JSON."""
    images = {name: {"type": "string", "format": "binary", "description": IMAGES[name]} for name in files}
    schema = {**model.model_json_schema(), "properties": {**_fields(model), **images}}
    schema["required"] = _required(model, files)
    content = {FORM: {"schema": schema}} | ({JSON: {"schema": as_json.model_json_schema()}} if as_json else {})
    return {"requestBody": {"required": True, "content": content}}


def described_json(model: type[JobRequest]) -> dict[str, Any]:
    """Returns the OpenAPI entry of a JSON body."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": model.model_json_schema()}}}}


def _fields(model: type[JobRequest]) -> dict[str, Any]:
    """The model's fields as JSON schema without null, since a form leaves a field out instead."""
    fields = {}
    for name, field in model.model_json_schema()["properties"].items():
        kinds = [kind for kind in field.get("anyOf", []) if kind != {"type": "null"}]
        plain = {key: value for key, value in field.items() if key != "anyOf"}
        fields[name] = plain | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})
    return fields


def _required(model: type[JobRequest], files: Mapping[str, bool]) -> list[str]:
    needed = [name for name, field in model.model_fields.items() if field.is_required()]
    return [*needed, *(name for name, must in files.items() if must)]


def from_base64(text: str, limit: int, name: str = "reference") -> bytes:
    """Decodes base64 or a `data:` URL of the field `name`. Other URLs are rejected: the server fetches nothing."""
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise UsageError("request_invalid", f"{name}: a data: URL must hold base64")
    elif "://" in text[:20]:
        raise UsageError("request_invalid", f"{name}: addresses are not fetched; send the image as base64")
    if len(text) > limit * 4 // 3 + 4:
        sizes = f"about {documents.size(len(text) * 3 / 4)} is over the limit of {documents.size(limit)}"
        raise UserError("image_too_large", f"{name}: {sizes}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("request_invalid", f"{name}: not base64") from None


def _within(schema: dict[str, Any], limits: Limits) -> None:
    """Narrows the fields of requests to the limits of this server, for its pages and errors."""
    bounds = {"steps": ("maximum", limits.steps), "n": ("maximum", limits.pictures)}
    bounds["prompt"] = ("maxLength", limits.prompt_letters)
    bodies = list(schema["components"]["schemas"].values())
    for methods in schema["paths"].values():
        for route in methods.values():
            bodies += [content["schema"] for content in route.get("requestBody", {}).get("content", {}).values()]
    for body in bodies:
        for name, field in body.get("properties", {}).items():
            key, value = bounds.get(name, ("", 0))
            for kind in [field, *field.get("anyOf", ())]:
                if key in kind:
                    kind[key] = min(kind[key], value)


def schema(app: FastAPI, is_open: bool, limits: Limits) -> dict[str, Any]:
    """Returns the API's description. `is_open`: requests need no token."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        if not is_open:
            made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            made["security"] = [{"token": []}]
        for path in ("/healthz", "/readyz"):
            made["paths"][path]["get"]["security"] = []
        _within(made, limits)
        app.openapi_schema = made
    return app.openapi_schema
