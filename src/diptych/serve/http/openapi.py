"""What a request's fields may hold, in words, from the API's own schema: for the pages of `/docs` and for errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WORDS = "x-words"  # in a field's schema: what it may hold, where its pattern says that to machines alone
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
