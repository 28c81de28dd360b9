"""What pydantic finds wrong with a value, in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from diptych.errors import nearest

if TYPE_CHECKING:
    from pydantic import ValidationError

# Where pydantic's own words are about parsing and types.
_WORDS = {
    "bool_parsing": "must be yes or no",
    "bool_type": "must be yes or no",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a section of `key: value` lines",
    "model_type": "must be a section of `key: value` lines",
    "model_attributes_type": "must be a section of `key: value` lines",
    "missing": "missing",
}


def said(error: Mapping[str, Any]) -> str:
    """One of `ValidationError.errors()` as what the value must be; our own validators' words as they are."""
    kind, context = str(error["type"]), error.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}"
    if kind == "string_too_short" and context.get("min_length", 1) > 1:
        return f"must have at least {context['min_length']} characters"
    if kind == "string_too_long":
        return f"must have at most {context['max_length']} characters"
    if kind == "too_short":
        return f"must have at least {context['min_length']} values"
    if kind == "too_long":
        return f"must have at most {context['max_length']} values"
    return _WORDS.get(kind) or str(error["msg"]).replace("Input should be", "must be")


def first(error: ValidationError, keys: Iterable[str]) -> str:
    """What is wrong first in a file, with its place; a misspelt key, or a misspelt word of a few, with the nearest."""
    errors: list[Any] = list(error.errors())
    # A key that is needed and misspelt is also missing: its misspelling says more.
    telling = [found for found in errors if found["type"] == "extra_forbidden" or "[key]" in found["loc"]]
    found = (telling or errors)[0]
    place = [str(part) for part in found["loc"] if part != "[key]"]
    where = ".".join(place) or "the file"
    if found["type"] == "extra_forbidden":
        return f"{where}: no such key{nearest(place[-1], keys)}"
    words = re.findall(r"'([^']*)'", str(found.get("ctx", {}).get("expected", "")))
    hint = nearest(str(found["input"]), words)
    if "[key]" in found["loc"]:
        return f"{where}: no such key; keys here are {', '.join(words)}{hint}"
    return f"{where}: {said(found)}{hint}"


def size(count: float) -> str:
    """Bytes in words: `20 MiB`, `10.2 KiB`."""
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 / 2 else f"{count / 2**10:.3g} KiB"
