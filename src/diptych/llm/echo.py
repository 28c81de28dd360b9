"""Finds answers that are the question's or the schema's own words ("Your answer to step 1."): models that were shown
nothing, or understood nothing, send those back, and they fit every schema.

Compared are the instructions alone. What stands in `quoted` marks is other people's text, which an answer may well
repeat, and what stands in double quotes is an example.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from diptych.llm import schema
from diptych.llm.question import QUOTED, Question

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
