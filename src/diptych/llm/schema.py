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
FORM = "Answer with one JSON object and nothing else. It must match this JSON schema"
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
    return f"{FORM}: {schema}"


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

    Text between a model's thinking marks is not an answer, and neither is a broken sketch that a whole object
    follows. Raises Invalid where there is none, or where the last one is broken: the inside of a cut-off object is no
    answer.
    """
    found: dict[str, Any] | None = None
    broken: Invalid | None = None
    at = 0
    while start := _NEXT.search(text, at):
        at = start.end()
        if start["open"] and (end := _CLOSE.search(text, at)):
            at = end.end()
        elif start["close"]:
            found, broken = None, None  # what came before were thoughts, without a mark at their beginning
        elif start["object"]:
            try:
                found, at = decode(text, start.start())
                broken = None
            except Invalid:
                raise
            except ValueError as error:
                broken = Invalid(f"is not valid JSON: {error}")
                if (at := _end(text, start.start())) < 0:
                    if (thought := _CLOSE.search(text, start.end())) is None:
                        break
                    at = thought.start()
    if broken is not None:
        raise broken
    if found is None:
        raise Invalid("holds no JSON object" if text.strip() else "is empty")
    return found


def decode(text: str, at: int = 0) -> tuple[Any, int]:
    """A JSON value in a text from `at` on, and where it ends. Invalid if it is nested too deeply, ValueError if it is
    broken: a key that is there twice, or a number that JSON does not have, too."""
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise Invalid("is nested too deeply") from None


def _end(text: str, start: int) -> int:
    """Where the braces that open at `start` are closed again, JSON's strings left aside; -1 if they never are."""
    depth = 0
    for piece in _PIECE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(piece[0], 0)
        if not depth:
            return piece.end()
    return -1


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


_NAMES = r"(?:\w+:)?(?:think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad)"
_MARK = r"(?:<{0}{1}>|\[{0}{1}\]|◁{0}{1}▷)"  # as <think>, [THINK] and ◁think▷ of one model or another
_CLOSED = _MARK.format("/", _NAMES) + r"|<\|end_of_thought\|>|<\|channel\|>final<\|message\|>"
_OPENED = _MARK.format("", _NAMES) + r"|<\|begin_of_thought\|>|<\|channel\|>(?:analysis|commentary)\b"
# "{name}" in prose is no object.
_NEXT = re.compile(rf'(?P<open>{_OPENED})|(?P<close>{_CLOSED})|(?P<object>\{{\s*["}}])', re.IGNORECASE)
_CLOSE = re.compile(_CLOSED, re.IGNORECASE)
_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|[{}]', re.DOTALL)
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
