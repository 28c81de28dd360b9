"""The shape of an answer: what a server and a model are told of it, and how a reply is read.

A pydantic model is the one source: its JSON schema is what is asked for, its validation is what counts.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from diptych.llm.question import clean

# Constraints that one server or another refuses in a schema it has to enforce. They are told in words, and hold here.
UNENFORCED = frozenset(
    {"minLength", "maxLength", "pattern", "format", "uniqueItems", "minProperties", "maxProperties", "multipleOf"}
)
_IDLE = frozenset({"title", "default", "examples", "discriminator"})
_SHOWN = 5  # mistakes that a repair turn names


class Invalid(ValueError):
    """A reply that is not the answer; the message says what is wrong with it, for the model and for people."""


def told(answer: type[BaseModel]) -> dict[str, Any]:
    """The whole JSON schema, without references: every field required, none besides."""
    return _plain(answer, _IDLE)


def enforced(answer: type[BaseModel]) -> dict[str, Any]:
    """The part of it that servers can enforce."""
    return _plain(answer, _IDLE | UNENFORCED)


def response_format(answer: type[BaseModel], mode: str) -> dict[str, Any]:
    """What a request's body says about the answer's form in a JSON mode: nothing, any JSON, or the schema."""
    if mode == "none":
        return {}
    if mode == "json_object":
        return {"response_format": {"type": "json_object"}}
    name = re.sub(r"[^A-Za-z0-9_-]", "_", answer.__name__)[:64]
    schema = {"name": name, "strict": True, "schema": enforced(answer)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def in_words(answer: type[BaseModel]) -> str:
    """The line that tells a model the form: not every server shows it the schema that it enforces."""
    schema = json.dumps(told(answer), ensure_ascii=False)
    return f"Answer with one JSON object and nothing else. It must match this JSON schema: {schema}"


def read(text: str, answer: type[BaseModel]) -> dict[str, Any]:
    """The answer in a reply, validated, as plain values. Raises Invalid.

    Types are strict, as JSON has them ("true" is no boolean); a key that the answer does not have is dropped, unless
    the pydantic model forbids it. What JSON spelt as an escape (`\\u001b`) is cleaned like any other text.
    """
    value = json_object(text)
    try:
        return answer.model_validate_json(json.dumps(_cleaned(value)), strict=True).model_dump(mode="json")
    except RecursionError:
        raise Invalid("is nested too deeply") from None
    except ValidationError as error:
        wrong = [f"{'.'.join(str(p) for p in e['loc']) or 'answer'}: {e['msg']}" for e in error.errors()]
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise Invalid("does not match the schema: " + "; ".join(wrong[:_SHOWN]) + more) from error


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in a reply: all of it, or the last object among thoughts, prose and code fences.

    Raises Invalid where there is none, or where one is broken: the inside of a cut-off object is no answer.
    """
    text = text.rpartition("</think>")[2]
    found: dict[str, Any] | None = None
    at = 0
    while start := _OBJECT.search(text, at):
        try:
            found, at = _DECODER.raw_decode(text, start.start())
        except RecursionError:
            raise Invalid("is nested too deeply") from None
        except ValueError as error:
            raise Invalid(f"is not valid JSON: {error}") from error
    if found is None:
        raise Invalid("holds no JSON object" if text.strip() else "is empty")
    return found


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return {key: _cleaned(item) for key, item in value.items()} if isinstance(value, dict) else value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is there twice")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_OBJECT = re.compile(r'\{\s*["}]')  # "{name}" in prose is none
_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)


def _plain(answer: type[BaseModel], dropped: frozenset[str]) -> dict[str, Any]:
    full = answer.model_json_schema()
    return _node(full, full.get("$defs", {}), dropped, ())


def _node(node: Any, defs: dict[str, Any], dropped: frozenset[str], inside: tuple[str, ...]) -> Any:
    """A schema with its references replaced by what they mean. ValueError for a type that contains itself."""
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        if name in inside:
            raise ValueError(f"the answer type {name} contains itself; servers cannot enforce that")
        beside = {key: value for key, value in node.items() if key != "$ref"}
        return _node(defs[name] | beside, defs, dropped, (*inside, name))

    def below(value: Any) -> Any:
        return _node(value, defs, dropped, inside)

    result: dict[str, Any] = {}
    for key, value in node.items():
        if key in dropped or key == "$defs":
            continue
        if key == "properties":
            result[key] = {name: below(field) for name, field in value.items()}
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            result["anyOf" if key == "oneOf" else key] = [below(option) for option in value]
        elif key == "const":
            result["enum"] = [value]
        else:
            result[key] = below(value) if key in ("items", "additionalProperties") else value
    if result.get("type") == "object" and "properties" in result:
        result |= {"required": list(result["properties"]), "additionalProperties": False}
    return result
