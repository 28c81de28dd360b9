"""Recipes: one YAML file defines a run. It is validated by one model and frozen beside the results.

recipe = load("recipes/pocket.yaml", sets=["distill.steps=2000"])
recipe.distill.steps         # typed, validated, documented in `schema`
print(recipe.dump())         # every key, defaults included; equal recipes give equal text
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
    """Names of the recipes that ship with diptych."""
    return sorted(path.stem for path in packaged("recipes").glob("*.yaml"))


def load(path: str | Path, sets: typing.Sequence[str] = ()) -> Recipe:
    """A recipe from a file, or one that ships by its name, overridden by `sets` (`"stage.key=value"`, YAML values).

    Raises UsageError with one line for each mistake; it names the key and, for a misspelled key, the nearest one.
    """
    where = find(path)
    values = parse_yaml(read_text(where), str(where))
    if not isinstance(values, dict):
        raise UsageError("recipe_invalid", f"{where}: not a recipe, which is a list of `key: value` lines")
    overlay: dict[str, Any] = {}
    for text in sets:
        _merge(overlay, parse_set(text))
    _merge(values, overlay)
    return check(values, str(where), overlay)


def find(path: str | Path) -> Path:
    """The recipe file for a path, a run folder, or the name of a recipe that ships. UsageError if there is none."""
    where = place(path if is_remote(path) else here_or_packaged(path))
    if where.is_file():
        return where
    if where.is_dir() and (where / "recipe.yaml").is_file():
        return where / "recipe.yaml"
    shipped = packaged("recipes") / f"{path}.yaml"
    if where.name == str(path) and shipped.is_file():
        return shipped
    shipping = ", ".join(names()) or "none"
    raise UsageError(
        "path_not_found", f"{path}: no such recipe file; recipes that ship: {shipping}{nearest(where.stem, names())}"
    )


def run_of(path: str | Path) -> str | None:
    """`path` if it is the folder of a run; None for a recipe's file or name."""
    where = find(path)
    return str(path) if where.name == "recipe.yaml" and where.parent == place(path) else None


def check(values: Any, where: str, overlay: dict[str, Any] | None = None) -> Recipe:
    """Plain values as a Recipe. Messages name the file `where`, or --set for the keys in `overlay`."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        # A validator of a whole section compares its keys.
        conflict = all(one["type"] == "value_error" and isinstance(one["input"], dict) for one in errors)
        message = "\n".join(_describe(errors, where, flat(overlay or {})))
        raise UsageError("recipe_conflict" if conflict else "recipe_invalid", message) from error


def parse_set(text: str) -> dict[str, Any]:
    """`"distill.steps=200"` as `{"distill": {"steps": 200}}`; the value is YAML."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UsageError("option_invalid", f"--set {text}: use stage.key=value, for instance --set distill.steps=200")
    parsed = parse_yaml(value, f"--set {text[:200]}")
    for part in reversed(parts):
        parsed = {part: parsed}
    return parsed


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _describe(errors: list[Any], where: str, from_set: dict[str, Any]) -> list[str]:
    """pydantic's errors as one line for each key: the file or --set, the key, what is wrong, and what to write."""
    wrong: dict[str, tuple[list[str], str]] = {}
    known = {part for path in _every_path() for part in path.split(".")}
    for error in errors:
        loc, kind = error["loc"], error["type"]
        # pydantic also puts the type of a union and the index of a list into the path.
        key = ".".join(str(p) for p in loc if kind == "extra_forbidden" or (isinstance(p, str) and p in known))
        got = f", not {json.dumps(error['input'], ensure_ascii=False, default=str)}"
        if kind == "extra_forbidden":
            text, got = f"no such key{_nearest_key(loc)}", ""
        elif kind == "missing" and isinstance(loc[-1], str):
            text, got = "missing", ""
        elif kind in ("missing", "too_short", "too_long"):
            text, got = "has too many values" if kind == "too_long" else "has too few values", ""
        else:
            text, got = documents.explain(error), "" if kind == "value_error" else got
        wrong.setdefault(key, ([], got))[0].append(text)
    lines = []
    for key, (texts, got) in wrong.items():
        # A list is one value of --set, and its sections' keys are below it.
        in_set = any(k == key or k.startswith(f"{key}.") or key.startswith(f"{k}.") for k in from_set)
        joined = " or ".join(dict.fromkeys(texts)).replace(" or must be", " or")
        source = f"--set {key}" if in_set else ": ".join(filter(None, (where, key)))  # no key: two sections conflict
        lines.append(f"{source}: {joined}{got}")
    return lines


def _nearest_key(loc: tuple[Any, ...]) -> str:
    """A hint: the nearest key of the same section, or the same key in another section, or the keys of this one."""
    section: Any = Recipe
    for part in loc[:-1]:
        if isinstance(part, str):  # not the index of a list
            section = _section(section.model_fields[part].annotation)
    word = str(loc[-1])
    hint = nearest(word, section.model_fields)
    if hint:
        return hint
    elsewhere = [key for key in _every_path() if key.rsplit(".", 1)[-1] == word]
    if elsewhere:
        depth = min(key.count(".") for key in elsewhere)  # a key of a stage before one of its parts
        return f"; did you mean {' or '.join(repr(key) for key in elsewhere if key.count('.') == depth)}?"
    return nearest(word, _every_path()) or f"; keys here: {', '.join(section.model_fields)}"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model of a key that is a section, an optional section or a list of sections; None for a plain value."""
    several = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is list
    options = typing.get_args(annotation) if several else (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _every_path(section: Any = Recipe, prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, field in section.model_fields.items():
        nested = _section(field.annotation)
        paths += [f"{prefix}{name}", *(_every_path(nested, f"{prefix}{name}.") if nested else [])]
    return paths
