"""The form of an answer: its JSON schema, how a reply is parsed and validated, and how an echo is recognized.

A pydantic model is the one source: its JSON schema is requested, and its validation decides.

An echo is an answer in the words of the question or of the schema ("Your answer to step 1."). Models that were shown
nothing, or understood nothing, return such text, and it fits every schema. It is compared with the instructions alone:
text in `quoted` marks is other people's text, which an answer may repeat, and text in double quotes is an example.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ValidationError

from diptych.llm.question import QUOTED, Question, clean

# Constraints that some servers reject in a schema they have to enforce. The model reads them in the instructions, and
# validation here applies them.
UNENFORCED = frozenset(
    {"minLength", "maxLength", "pattern", "format", "uniqueItems", "minProperties", "maxProperties", "multipleOf"}
)
FORM = "Answer with one JSON object and nothing else. It must match this JSON schema"
PHRASE = 3  # words of a description in the schema that no answer has by chance
CLAUSE = 4  # words of a whole clause of the question, likewise
AROUND = 3  # words that an answer may add to a description and still be nothing else
_IDLE = frozenset({"title", "default", "examples", "discriminator"})
_SHOWN = 5  # mistakes that a repair turn names

_NAMES = r"(?:\w+:)?(?:think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad)"
_MARK = r"(?:<{0}{1}>|\[{0}{1}\]|◁{0}{1}▷)"  # as <think>, [THINK] and ◁think▷ of different models
_CLOSED = _MARK.format("/", _NAMES) + r"|<\|end_of_thought\|>|<\|channel\|>final<\|message\|>"
_OPENED = _MARK.format("", _NAMES) + r"|<\|begin_of_thought\|>|<\|channel\|>(?:analysis|commentary)\b"
# "{name}" in prose is not an object.
_NEXT = re.compile(rf'(?P<open>{_OPENED})|(?P<close>{_CLOSED})|(?P<object>\{{\s*["}}])', re.IGNORECASE)
_CLOSE = re.compile(_CLOSED, re.IGNORECASE)
_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|[{}]', re.DOTALL)

_CLAUSES = re.compile(r"[.?!;:,()\n]+")
_EXAMPLE = re.compile(r'"[^"]*"')
_WORD = re.compile(r"\w+")
_PLACEHOLDERS = ("string", "text", "your answer", "answer here")
Words = tuple[str, ...]


class Invalid(ValueError):
    """A reply that is not a valid answer. The message says what is wrong with it; the repair turn repeats it."""


def full_schema(answer: type[BaseModel]) -> dict[str, Any]:
    """Return the whole JSON schema without references. Every field is required, and no other is allowed."""
    return _plain(answer, _IDLE)


def enforced_schema(answer: type[BaseModel]) -> dict[str, Any]:
    """Return the part of the JSON schema that servers can enforce."""
    return _plain(answer, _IDLE | UNENFORCED)


def response_format(answer: type[BaseModel], mode: str) -> dict[str, Any]:
    """Return the keys of a request's body for a JSON mode: nothing, any JSON, or the schema."""
    if mode == "none":
        return {}
    if mode == "json_object":
        return {"response_format": {"type": "json_object"}}
    name = re.sub(r"[^A-Za-z0-9_-]", "_", answer.__name__)[:64]
    schema = {"name": name, "strict": True, "schema": enforced_schema(answer)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def in_words(answer: type[BaseModel]) -> str:
    """Return the instruction about the form. Not every server shows the model the schema that it enforces."""
    return f"{FORM}: {json.dumps(full_schema(answer), ensure_ascii=False)}"


def read(text: str, answer: type[BaseModel]) -> dict[str, Any]:
    """Return the validated answer of a reply as plain values. Raises Invalid.

    Types are strict, as in JSON ("true" is not a boolean). Unknown keys are dropped, unless the pydantic model forbids
    them. Characters that JSON writes as escapes (`\\u001b`) are cleaned like any other text.
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
    """Return the JSON object of a reply, or the last object among thoughts, prose and code fences.

    Text between a model's thinking marks is not an answer, and neither is a broken object before a complete one.
    Raises Invalid if there is no object or the last one is broken: the inside of a cut-off object is not an answer.
    """
    result: dict[str, Any] | None = None
    broken: Invalid | None = None
    at = 0
    while start := _NEXT.search(text, at):
        at = start.end()
        if start["open"] and (end := _CLOSE.search(text, at)):
            at = end.end()
        elif start["close"]:
            result, broken = None, None  # everything before were thoughts without a mark at their beginning
        elif start["object"]:
            try:
                result, at = decode(text, start.start())
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
    if result is None:
        raise Invalid("holds no JSON object" if text.strip() else "is empty")
    return result


def decode(text: str, at: int = 0) -> tuple[Any, int]:
    """Return the JSON value that begins at `at`, and where it ends.

    Raises Invalid if it is nested too deeply, and ValueError if it is broken, has a key twice, or has a number that
    JSON does not have.
    """
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise Invalid("is nested too deeply") from None


def _end(text: str, start: int) -> int:
    """Return where the braces that open at `start` close, braces in JSON strings not counted; -1 if they do not."""
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


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)


def _plain(answer: type[BaseModel], dropped: frozenset[str]) -> dict[str, Any]:
    full = answer.model_json_schema()
    return _node(full, full.get("$defs", {}), dropped, ())


def _node(node: Any, defs: dict[str, Any], dropped: frozenset[str], inside: tuple[str, ...]) -> Any:
    """Return a schema with its references resolved. Raises ValueError for a type that contains itself."""
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


def echoed(answer: Any, question: Question) -> str:
    """Return the first text of an answer that repeats the instructions; "" if none does."""
    form = _form(question.answer)
    clauses = [clause for text in _instructions(question) for clause in _clauses(text)]
    for text in _texts(answer):
        words = _words(text)
        if not words or words in form.options:
            continue
        if words in form.names or any(_repeats(words, about) for about in form.descriptions):
            return text[:80]
        if len(words) >= CLAUSE and _is_run(words, clauses):
            return text[:80]
    return ""


def _instructions(question: Question) -> Iterator[str]:
    """Yield the texts of a question without quoted text and without the assistant's turns."""
    yield FORM
    for message in question.messages:
        if message.role != "assistant":
            yield from (QUOTED.sub(" ", part) for part in message.parts if isinstance(part, str))


class _Form:
    """The words of a schema: its descriptions, the names of its fields, and the values that it allows."""

    def __init__(self, form: dict[str, Any]) -> None:
        self.descriptions: list[Words] = []
        self.names = {_words(name) for name in _PLACEHOLDERS}
        self.options: set[Words] = set()
        self._collect(form)

    def _collect(self, node: Any) -> None:
        if isinstance(node, list):
            for one in node:
                self._collect(one)
        if not isinstance(node, dict):
            return
        if isinstance(about := node.get("description"), str):
            self.descriptions.append(_words(_EXAMPLE.sub(" ", about)))
        fields = node.get("properties", {})
        self.names |= {_words(name) for name in fields if "_" in name}
        self.options |= {_words(value) for value in node.get("enum", ()) if isinstance(value, str)}
        for one in (*fields.values(), *(value for key, value in node.items() if key != "properties")):
            self._collect(one)


@lru_cache(maxsize=32)
def _form(answer: type[BaseModel]) -> _Form:
    return _Form(full_schema(answer))


def _repeats(words: Words, about: Words) -> bool:
    """Whether a text is a description, a phrase of it, or the whole of it with few other words."""
    if words == about or (len(words) >= PHRASE and _contains(about, words)):
        return True
    return len(about) >= PHRASE and len(words) <= len(about) + AROUND and _contains(words, about)


def _contains(whole: Words, part: Words) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))


def _is_run(words: Words, clauses: Sequence[Words]) -> bool:
    """Whether consecutive clauses are exactly these words."""
    for start in range(len(clauses)):
        run: Words = ()
        for clause in clauses[start:]:
            run += clause
            if run == words or (run[0] == "in" and run[1:] == words):
                return True
            if len(run) > len(words):
                break
    return False


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _words(text: str) -> Words:
    return tuple(_WORD.findall(text.casefold()))


def _clauses(text: str) -> list[Words]:
    return [words for clause in _CLAUSES.split(_EXAMPLE.sub(" ", text)) if (words := _words(clause))]
