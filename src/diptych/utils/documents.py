"""YAML and JSON that others wrote, read so that no document can hang or fill the machine.

A few hundred bytes of YAML aliases may stand for billions of values, and a deeply nested document breaks parsers and
whatever walks the result. Both are refused before anything is built of them.
"""

from __future__ import annotations

import json
from typing import Any

from diptych.errors import UsageError

DEEPEST = 64  # levels of lists and sections inside one another
MOST = 100_000  # values that a document with aliases may stand for
VALUES = 1000  # values in the JSON of a request
MARKS = 50_000  # brackets, commas and colons in it, those inside texts included
_DEEP = f"nested more than {DEEPEST} levels deep"


def parse_json(text: str | bytes) -> Any:
    """A JSON document. ValueError for one that is broken or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_request(body: bytes) -> Any:
    """A JSON document that a stranger sent. ValueError if it is broken, nested too deeply or of more values than
    any request needs, UsageError if a key is there twice. How much is built is bounded before anything is."""
    if sum(body.count(mark) for mark in (b"[", b"{", b",", b":")) > MARKS:
        raise ValueError(f"it has far more than the {VALUES:,} values that are allowed")
    try:
        found = json.loads(body, object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, count, depth = [found], 0, 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > VALUES:
            raise ValueError(f"it has more than the {VALUES:,} values that are allowed")
        if depth > DEEPEST:
            raise ValueError(_DEEP)
        inside = [
            list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))
        ]
        level = [value for values in inside for value in values]
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise UsageError(f"{json.dumps(twice[:60])}: this key is there twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON")


def parse_yaml(text: str, where: str) -> Any:
    """A YAML document as plain values. UsageError, in one line that begins with `where`, if it is not valid, has a key
    twice in one section, is nested too deeply, or has aliases that stand for too much."""
    import yaml

    # In C where PyYAML was built with it. Its constructor is the Python one: it raises errors alone.
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        # Events come one by one, whereas nodes are built recursively.
        _check_depth(yaml.parse(text, Loader=loader))
        node = yaml.compose(text, Loader=loader)
        if node is None:
            return None
        _check_size(node)
        _check_keys(node)
        return yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{where}: not valid YAML{line}: {said}") from error
    except RecursionError:
        raise UsageError(f"{where}: {_DEEP}") from None
    except UsageError:
        raise
    except (_Refused, ValueError, OverflowError, TypeError) as error:
        # A date that is none, a number of thousands of digits, a key that is a list.
        raise UsageError(f"{where}: {' '.join(str(error).split())[:200]}") from None


class _Refused(Exception):
    """What is wrong with a document that YAML itself allows."""


def _check_depth(events: Any) -> None:
    import yaml

    depth = 0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise _Refused(_DEEP)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_size(node: Any) -> None:
    """Counts what the document stands for once its aliases are written out; without aliases it is as long as it is."""
    sizes: dict[int, int] = {}

    def size(one: Any) -> int:
        if id(one) in sizes:
            if not sizes[id(one)]:
                raise _Refused("an alias stands for something that it is a part of")
            return sizes[id(one)]
        sizes[id(one)] = 0  # under way
        sizes[id(one)] = 1 + sum(size(below) for below in _below(one))
        return sizes[id(one)]

    whole = size(node)
    if whole > max(MOST, len(sizes)):
        raise _Refused(f"its aliases stand for {whole:.3g} values; at most {MOST:,}")


def _check_keys(node: Any) -> None:
    """PyYAML keeps the last of two equal keys without a word."""
    import yaml

    todo, seen = [node], {id(node)}
    while todo:
        one = todo.pop()
        if isinstance(one, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key, _ in one.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if name in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' is there twice", key.start_mark
                    )
                if name is not None and name[0] != "tag:yaml.org,2002:merge":
                    keys.add(name)
        below = [other for other in _below(one) if id(other) not in seen]
        seen |= {id(other) for other in below}
        todo += below


def _below(node: Any) -> list[Any]:
    if not isinstance(node.value, list):
        return []
    return [part for one in node.value for part in (one if isinstance(one, tuple) else (one,))]
