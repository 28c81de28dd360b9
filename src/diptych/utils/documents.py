"""YAML and JSON that others wrote, read so that no document can hang or fill the machine.

A few hundred bytes of YAML aliases may stand for billions of values, and a deeply nested document breaks parsers and
whatever walks the result. Both are refused before anything is built of them.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UsageError, UserError, describe, nearest

if TYPE_CHECKING:
    from pydantic import ValidationError

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
        raise UsageError("yaml_invalid", f"{where}: not valid YAML{line}: {said}") from error
    except RecursionError:
        raise UsageError("yaml_invalid", f"{where}: {_DEEP}") from None
    except UsageError:
        raise
    except (_Refused, ValueError, OverflowError, TypeError) as error:
        # A date that is none, a number of thousands of digits, a key that is a list.
        raise UsageError("yaml_invalid", f"{where}: {describe(error)}") from None


def facts(module: str) -> Any:
    """The table of facts in the YAML file that ships beside a module (its `__file__`), under the module's name."""
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(Path(module).with_suffix(".yaml").read_text("utf8"), Loader=loader)


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


# What pydantic finds wrong with a value, in plain words.

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


# The one reader of text files that people wrote: captions, prompts, JSONL, CSV, YAML, word lists. They are UTF-8,
# with or without a byte order mark. Anything else is refused with the file, the place and what to do: a guess would
# put wrong letters into prompts and captions, and nobody would see it.

MARK = "\ufeff"  # a byte order mark once it is decoded
# The longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_FOREIGN = 1 / 3  # share of bytes above 127 from which a line is hardly a Western European language in Latin-1


def read_text(path: Path) -> str:
    """A text file, its line ends as `\\n`. UsageError if it is not UTF-8, UserError if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    return decode(data, str(path))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without their ends. Errors are those of `read_text`.

    Other characters that Unicode calls ends of a line stay inside a line, because JSON strings may hold them.
    """
    lines = read_text(path).split("\n")
    return lines if lines[-1] else lines[:-1]


def stream_lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """The same from an open file, which may be larger than memory."""
    for number, raw in enumerate(stream, 1):
        # The first two bytes of a UTF-16 file say so only at its start.
        yield from decode(raw, name, number).removesuffix("\n").split("\n")


def decode(data: bytes, name: str, line: int = 1) -> str:
    """Bytes as text, without byte order marks; `name` and `line` are where they begin. UsageError if not UTF-8."""
    nul = data.find(0)
    try:
        text, at = data.decode("utf-8-sig"), nul
    except UnicodeDecodeError as error:
        text, at = "", min(error.start, nul) if nul >= 0 else error.start
    if at < 0:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        # Files that were joined have a mark wherever one of them began.
        return text.lstrip(MARK).replace(f"\n{MARK}", "\n")
    start = data.rfind(b"\n", 0, at) + 1
    encoding, code = _guess(data, data[start:].partition(b"\n")[0], line == 1)
    raise UsageError(
        f"{name}, line {line + data[:at].count(10)}, byte {at - start + 1}: this is not UTF-8; by its bytes it is "
        f"{encoding}. Save the file as UTF-8, for instance with: iconv -f {code} -t UTF-8 OLD > NEW"
    )


def _guess(data: bytes, row: bytes, is_start: bool) -> tuple[str, str]:
    """What encoding text that is not UTF-8 seems to have, and iconv's name for it. `row` is the first such line."""
    for mark, name in _MARKS.items() if is_start else ():
        if data.startswith(mark):
            return name, name
    if b"\0" in data:
        wide = data.count(0) > len(data) / 4
        return ("UTF-16", "UTF-16LE" if data[1:2] == b"\0" else "UTF-16BE") if wide else ("not text", "ENCODING")
    if sum(byte > 127 for byte in row) > _FOREIGN * len(row):
        return "an East Asian or Cyrillic encoding", "ENCODING"
    return "Latin-1 (Windows-1252)", "WINDOWS-1252"
