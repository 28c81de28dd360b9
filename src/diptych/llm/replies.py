"""Replies in other protocols than chat completions, recognized by their form, and what to do about each."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from diptych.errors import UserError
from diptych.llm import schema
from diptych.llm.cache import Cache
from diptych.llm.question import QUOTED, Outcome, Question

_STREAM = re.compile(rb"\s*(?:\xef\xbb\xbf)?(?:data|event|id|retry)?:")
_UNSTREAMED = "it streams, although it was asked not to; turn streaming off in the server or in the proxy before it"
_OPENAI = "set base_url to its OpenAI-compatible API, which mostly ends in /v1"


def foreign(data: bytes) -> str:
    """What a reply is instead of a chat completion, and the remedy; "" for anything that is not recognized."""
    if _STREAM.match(data):
        return f"a stream of server-sent events: {_UNSTREAMED}"
    try:
        # Ollama's stream is one object a line.
        value: Any = json.loads(data if b"\n{" not in data.strip() else data.strip().splitlines()[0])
    except (ValueError, RecursionError):
        return ""
    if not isinstance(value, dict):
        return ""
    if "done" in value and ("message" in value or "response" in value):
        return f"a reply of Ollama's native API: {_OPENAI}, for Ollama http://localhost:11434/v1"
    if value.get("object") == "chat.completion.chunk":
        return f"a piece of a stream: {_UNSTREAMED}"
    if value.get("object") == "response" and "output" in value:
        return f"a reply of the Responses API: {_OPENAI}, without /responses"
    if value.get("type") == "message" and isinstance(value.get("content"), list):
        return f"a reply of Anthropic's Messages API: {_OPENAI}"
    if isinstance(value.get("candidates"), list):
        return f"a reply of Gemini's native API: {_OPENAI}, for Gemini /v1beta/openai"
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(first, dict) and "text" in first and "message" not in first:
        return f"a plain text completion: {_OPENAI}"
    return ""


# Finds answers that are the question's or the schema's own words ("Your answer to step 1."): models that were shown
# nothing, or understood nothing, send those back, and they fit every schema. Compared are the instructions alone.
# What stands in `quoted` marks is other people's text, which an answer may well repeat, and what stands in double
# quotes is an example.

PHRASE = 3  # words of a description in the schema that no answer has by chance
CLAUSE = 4  # words of a whole clause of the question, likewise
AROUND = 3  # words that an answer may put around a description and still be nothing but it
_CLAUSES = re.compile(r"[.?!;:,()\n]+")
_EXAMPLE = re.compile(r'"[^"]*"')
_WORD = re.compile(r"\w+")
_PLACEHOLDERS = ("string", "text", "your answer", "answer here")
Words = tuple[str, ...]


def found(answer: Any, question: Question) -> str:
    """The first text of an answer that repeats the instructions; "" if none does."""
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
    """What a question says, without other people's text and without what the model is made to have said."""
    yield schema.FORM
    for message in question.messages:
        if message.role != "assistant":
            yield from (QUOTED.sub(" ", part) for part in message.parts if isinstance(part, str))


class _Form:
    """What a schema says: its descriptions, the names of its fields, and the values that it allows."""

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
    return _Form(schema.told(answer))


def _repeats(words: Words, about: Words) -> bool:
    """Whether a text is a description or a phrase of it, or little else than the whole of it."""
    if words == about or (len(words) >= PHRASE and _holds(about, words)):
        return True
    return len(about) >= PHRASE and len(words) <= len(about) + AROUND and _holds(words, about)


def _holds(whole: Words, part: Words) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))


def _is_run(words: Words, clauses: Sequence[Words]) -> bool:
    """Whether some clauses that follow one another are these very words."""
    for start in range(len(clauses)):
        said: Words = ()
        for clause in clauses[start:]:
            said += clause
            if said == words or (said[0] == "in" and said[1:] == words):
                return True
            if len(said) > len(words):
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


# Stops a run whose questions get no valid answer, one after the other: no reply, empty replies, or useless ones.

SHOWN = 120  # characters of a useless reply in the error


@dataclass
class Streak:
    """Counts questions in a row without a valid answer. `most` of them are a UserError; 0 is never. Threads may share
    it. Answers from the cache say nothing about the model now, and do not count."""

    who: str
    most: int
    cache: Cache | None
    remedy: str
    failed: str = "got no answer"
    _keys: list[str] = field(default_factory=list)
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, outcome: Outcome) -> None:
        """Takes a question's outcome in. When the streak ends the run, its replies are forgotten, and so are those
        still under way that are no better: the next run asks for them again."""
        if outcome.cached or not outcome.keys:
            return
        with self._lock:
            if outcome.status == "answered":
                self._count, self._keys = 0, []
                return
            self._count += 1
            self._keys += outcome.keys
            if not 0 < self.most <= self._count:
                return
            count, keys, self._keys = self._count, self._keys, []
        if self.cache is not None:
            self.cache.drop(keys)
        came = " ".join(outcome.text.split())
        came = "".join(char for char in came if char.isprintable())
        shown = f"; it said '{came[:SHOWN]}{'…' if len(came) > SHOWN else ''}'" if came else ""
        none = self.failed if outcome.status == "failed" else "got no valid answer"
        why = f"the last because {outcome.reason}{shown}"
        raise UserError(f"{self.who}: {count} questions in a row {none}, {why}; {self.remedy}")
