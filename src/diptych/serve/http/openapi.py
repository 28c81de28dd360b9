"""Requests and the API's schema: how bodies are read, and what their fields may hold.

`of_route` says it in words, from the schema itself: for the pages of `/docs` and for errors. `read` takes a form
(multipart/form-data) and `read_json` a JSON body as one of the models of `request_models`; `described` and
`described_json` are their entries in the schema. `files` says which pictures a form has, and whether each must be
there; a list in the model is a field that is repeated.
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
class Field:
    """A field of a request: its name, what it may hold, and what the description says of it."""

    name: str
    schema: Mapping[str, Any]
    required: bool
    where: str  # path, query or body
    description: str

    @property
    def allowed(self) -> str:
        """Its type and range in words."""
        return allowed(self.schema)

    @property
    def default(self) -> str:
        """Its default as JSON, empty if it has none."""
        return "" if self.schema.get("default") is None else json.dumps(self.schema["default"])

    @property
    def example(self) -> str:
        """An example as JSON, empty if there is none."""
        return json.dumps(self.schema["examples"][0]) if self.schema.get("examples") else ""


def of_route(schema: Mapping[str, Any], path: str, method: str, media: str = "") -> list[Field]:
    """The fields of a route of an OpenAPI description, each name once; empty for a route that is not in it. Of a body
    that may come in several ways, those of `media` alone, if it is one of them."""
    route = schema["paths"].get(path, {}).get(method.lower(), {})
    found = [
        Field(p["name"], p["schema"], p.get("required", False), p["in"], p.get("description", ""))
        for p in route.get("parameters", [])
    ]
    contents = route.get("requestBody", {}).get("content", {})
    for content in [contents[media]] if media in contents else contents.values():
        body = content.get("schema", {})
        if "$ref" in body:
            body = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
        found += of_schema(body)
    return list({field.name: field for field in reversed(found)}.values())[::-1]


def of_schema(body: Mapping[str, Any]) -> list[Field]:
    """The fields of an object's JSON schema."""
    needed = body.get("required", ())
    return [
        Field(name, field, name in needed, "body", field.get("description", ""))
        for name, field in body.get("properties", {}).items()
    ]


def allowed(schema: Mapping[str, Any]) -> str:
    """What a value may be, as a noun phrase: `a whole number from 1 to 100`."""
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
    """The values of a field that takes one of a few."""
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


def shown(value: Any, most: int = 60) -> str:
    """A wrong value, short enough for a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= most else f"{text[:most]}…"


MOST_FIELDS = 60


FORM = "multipart/form-data"


JSON = "application/json"


PICTURES = {
    "image": "The picture of your subject: PNG, JPEG, WebP, …",
    "mask": "Of the picture's size: white may change, black stays.",
}


MASKLESS = "; the whole image is generated, so a mask has no meaning here"


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


def from_base64(text: str, most: int, name: str = "reference") -> bytes:
    """The bytes of base64, also as a `data:` URL; any other URL is refused: nothing is fetched from anywhere. `name` is
    the field's."""
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise UsageError(f"{name}: a data: URL must hold base64")
    elif "://" in text[:20]:
        raise UsageError(f"{name}: an address; this server fetches nothing, so send the picture itself as base64")
    if len(text) > most * 4 // 3 + 4:
        raise UserError(
            f"{name}: about {documents.size(len(text) * 3 / 4)} is over the limit of {documents.size(most)}"
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(f"{name}: not base64") from None


def _within(schema: dict[str, Any], limits: Limits) -> None:
    """Narrows the fields of requests to what this server allows, so that its pages and errors say that."""
    most = {"steps": ("maximum", limits.steps), "n": ("maximum", limits.pictures)}
    most["prompt"] = ("maxLength", limits.prompt_letters)
    bodies = list(schema["components"]["schemas"].values())
    for methods in schema["paths"].values():
        for route in methods.values():
            bodies += [content["schema"] for content in route.get("requestBody", {}).get("content", {}).values()]
    for body in bodies:
        for name, field in body.get("properties", {}).items():
            key, value = most.get(name, ("", 0))
            for kind in [field, *field.get("anyOf", ())]:
                if key in kind:
                    kind[key] = min(kind[key], value)


def schema(app: FastAPI, is_open: bool, limits: Limits) -> dict[str, Any]:
    """The API's description; `is_open`: no token is asked for."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        if not is_open:
            found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"token": []}]
        for path in ("/healthz", "/readyz"):
            found["paths"][path]["get"]["security"] = []
        _within(found, limits)
        app.openapi_schema = found
    return app.openapi_schema
