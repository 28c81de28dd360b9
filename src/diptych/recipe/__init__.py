"""What a run is: one YAML file, checked by one model, frozen beside the results.

recipe = load("recipes/pocket.yaml", sets=["distill.steps=2000"])
recipe.distill.steps         # typed, in range, documented in `schema`
print(recipe.dump())         # every key, defaults included, always the same text
"""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from diptych.errors import UsageError, nearest
from diptych.recipe.schema import Recipe, flat
from diptych.utils import documents
from diptych.utils.documents import parse_yaml, read_text
from diptych.utils.paths import here_or_packaged, is_remote, packaged, place


def names() -> list[str]:
    """The recipes that ship with diptych."""
    return sorted(path.stem for path in packaged("recipes").glob("*.yaml"))


def load(path: str | Path, sets: typing.Sequence[str] = ()) -> Recipe:
    """A recipe from a file or by the name of one that ships, with `sets` (`"stage.key=value"`, YAML values) laid over.

    Raises UsageError: one line for each thing that is wrong, naming the key and, for a misspelt one, the nearest.
    """
    where = find(path)
    values = _read(where)
    overlay: dict[str, Any] = {}
    for text in sets:
        _merge(overlay, parse_set(text))
    _merge(values, overlay)
    return check(values, str(where), overlay)


def find(path: str | Path) -> Path:
    """The recipe file meant by a path or by the name of a recipe that ships."""
    where = place(path if is_remote(path) else here_or_packaged(path))
    if where.is_file():
        return where
    if where.is_dir() and (where / "recipe.yaml").is_file():
        return where / "recipe.yaml"
    shipped = packaged("recipes") / f"{path}.yaml"
    if where.name == str(path) and shipped.is_file():
        return shipped
    raise UsageError(
        f"{path}: no such recipe file; recipes that ship: {', '.join(names()) or 'none'}{nearest(where.stem, names())}"
    )


def check(values: Any, where: str, overlay: dict[str, Any] | None = None) -> Recipe:
    """Plain values as a Recipe; keys in `overlay` are blamed on --set and not on the file `where`."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        from_set = flat(overlay or {})
        raise UsageError("\n".join(_lines(error.errors(), where, from_set))) from error


def parse_set(text: str) -> dict[str, Any]:
    """`"distill.steps=200"` as `{"distill": {"steps": 200}}`; the value is YAML."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UsageError(f"--set {text}: write it as stage.key=value, for instance --set distill.steps=200")
    parsed = parse_yaml(value, f"--set {text[:200]}")
    for part in reversed(parts):
        parsed = {part: parsed}
    return parsed


def _read(path: Path) -> dict[str, Any]:
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a recipe is a list of `key: value` lines; this file is not")
    return values


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _lines(errors: list[Any], where: str, from_set: dict[str, Any]) -> list[str]:
    """pydantic's errors as one line for each key: the file or --set, the key, what is wrong, what to write."""
    wrong: dict[str, tuple[list[str], str]] = {}
    for error in errors:
        loc = error["loc"]
        kind = error["type"]
        known = _every_key()
        # Where a value may be of several types, pydantic adds the type to the path; where it is a list, the index.
        key = ".".join(str(p) for p in loc if kind == "extra_forbidden" or (isinstance(p, str) and p in known))
        got = f", not {json.dumps(error['input'], ensure_ascii=False, default=str)}"
        if kind == "extra_forbidden":
            text, got = f"no such key{_nearest_key(loc)}", ""
        elif kind == "missing" and isinstance(loc[-1], str):
            text, got = "missing", ""
        elif kind in ("missing", "too_short", "too_long"):
            text = "has too few values" if kind != "too_long" else "has too many values"
            got = ""
        else:
            text, got = documents.said(error), "" if kind == "value_error" else got
        wrong.setdefault(key, ([], got))[0].append(text)
    lines = []
    for key, (texts, got) in wrong.items():
        # A list is one value of --set, and its sections' keys are below it.
        in_set = any(k == key or k.startswith(f"{key}.") or key.startswith(f"{k}.") for k in from_set)
        joined = " or ".join(dict.fromkeys(texts)).replace(" or must be", " or")
        place_ = f"--set {key}" if in_set else ": ".join(filter(None, (where, key)))  # no key: what two of them say
        lines.append(f"{place_}: {joined}{got}")
    return lines


def _nearest_key(loc: tuple[Any, ...]) -> str:
    """The nearest key in the same section; failing that, the same key where it does belong."""
    section: Any = Recipe
    for part in loc[:-1]:
        if isinstance(part, str):  # and not the place in a list
            section = _section(section.model_fields[part].annotation)
    word = str(loc[-1])
    hint = nearest(word, section.model_fields)
    if hint:
        return hint
    elsewhere = [key for key in _every_path() if key.rsplit(".", 1)[-1] == word]
    if elsewhere:
        depth = min(key.count(".") for key in elsewhere)  # a stage's own key before one of its parts
        return f"; did you mean {' or '.join(repr(key) for key in elsewhere if key.count('.') == depth)}?"
    return nearest(word, _every_path()) or f"; keys here: {', '.join(section.model_fields)}"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, optional or not, or a list of; None for a plain value."""
    several = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is list
    options = typing.get_args(annotation) if several else (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _every_path(section: Any = Recipe, prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, field in section.model_fields.items():
        nested = _section(field.annotation)
        paths += [f"{prefix}{name}", *(_every_path(nested, f"{prefix}{name}.") if nested else [])]
    return paths


def _every_key() -> set[str]:
    return {part for path in _every_path() for part in path.split(".")}
