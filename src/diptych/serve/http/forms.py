"""Requests that bring pictures: forms (multipart/form-data), read into one of the models of `asked`.

`files` says which pictures a form has, and whether each must be there. A list in the model is a field that is repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from diptych.errors import UsageError
from diptych.serve.asked import Common
from diptych.utils.documents import parse_request

MOST_FIELDS = 60
FORM = "multipart/form-data"
JSON = "application/json"
PICTURES = {
    "image": "The picture of your subject: PNG, JPEG, WebP, …",
    "mask": "Of the picture's size: white may change, black stays.",
}
MASKLESS = "; the whole picture is drawn anew, so a mask has no meaning here"
Wanted = TypeVar("Wanted", bound=Common)


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


def described(model: type[Common], files: Mapping[str, bool], as_json: type[Common] | None = None) -> dict[str, Any]:
    """The OpenAPI entry of such a request's body; `as_json` describes the body of one that may also be JSON."""
    pictures = {name: {"type": "string", "format": "binary", "description": PICTURES[name]} for name in files}
    schema = {**model.model_json_schema(), "properties": {**_fields(model), **pictures}}
    schema["required"] = _required(model, files)
    content = {FORM: {"schema": schema}} | ({JSON: {"schema": as_json.model_json_schema()}} if as_json else {})
    return {"requestBody": {"required": True, "content": content}}


def described_json(model: type[Common]) -> dict[str, Any]:
    """The OpenAPI entry of a body that is JSON alone."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": model.model_json_schema()}}}}


def _fields(model: type[Common]) -> dict[str, Any]:
    """The model's fields as JSON schema, without null: a form leaves a field out instead."""
    fields = {}
    for name, field in model.model_json_schema()["properties"].items():
        kinds = [kind for kind in field.get("anyOf", []) if kind != {"type": "null"}]
        plain = {key: value for key, value in field.items() if key != "anyOf"}
        fields[name] = plain | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})
    return fields


def _required(model: type[Common], files: Mapping[str, bool]) -> list[str]:
    needed = [name for name, field in model.model_fields.items() if field.is_required()]
    return [*needed, *(name for name, must in files.items() if must)]
