"""Reads YAML, JSON, and text files of any origin, so that no document can hang the process or fill its memory.

A few hundred bytes of YAML aliases can expand to billions of values, and a deeply nested document breaks parsers and
every function that walks the result. Both are rejected before any value is built.
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

DEEPEST = 64  # levels of nested lists and sections
MOST = 100_000  # values that a document with aliases may expand to
VALUES = 1000  # values in the JSON of a request
MARKS = 50_000  # brackets, commas and colons in it, including those inside texts
_DEEP = f"nested more than {DEEPEST} levels deep"


def parse_json(text: str | bytes) -> Any:
    """Parses a JSON document. ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_request(body: bytes) -> Any:
    """Parses the JSON body of a request. The number of values is bounded before any is built.

    ValueError if it is invalid, nested too deeply, or has more than `VALUES` values; UsageError for a duplicate key.
    """
    if sum(body.count(mark) for mark in (b"[", b"{", b",", b":")) > MARKS:
        raise ValueError(f"it has far more than the limit of {VALUES:,} values")
    try:
        document = json.loads(body, object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, count, depth = [document], 0, 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > VALUES:
            raise ValueError(f"it has more than the limit of {VALUES:,} values")
        if depth > DEEPEST:
            raise ValueError(_DEEP)
        nested = [each for each in level if isinstance(each, (dict, list))]
        level = [value for each in nested for value in (each.values() if isinstance(each, dict) else each)]
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise UsageError("json_invalid", f"The key {json.dumps(twice[:60])} appears twice. Remove one of them.")
    return unique


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON")


def parse_yaml(text: str, where: str) -> Any:
    """A YAML document as plain values. UsageError, in one line that begins with `where`, if it is invalid, has a key
    twice in one section, is nested too deeply, or has aliases that expand to too many values."""
    import yaml

    # The C parser, if PyYAML has it. The Python constructor is used in both cases.
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        # Events are a stream, while nodes are built recursively.
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
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        opened = getattr(error, "context_mark", None)
        if opened and "quoted scalar" in str(getattr(error, "context", "")):
            problem += f"; the quote that opens in line {opened.line + 1} may lack its end"
        raise UsageError("yaml_invalid", f"{where}: not valid YAML{line}: {problem}") from error
    except RecursionError:
        raise UsageError("yaml_invalid", f"{where}: {_DEEP}") from None
    except UsageError:
        raise
    except (_Rejected, ValueError, OverflowError, TypeError) as error:
        # An impossible date, a number with thousands of digits, or a key that is a list.
        raise UsageError("yaml_invalid", f"{where}: {describe(error)}") from None


def facts(module: str) -> Any:
    """The table in the YAML file beside a module (its `__file__`) that has the module's name."""
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(Path(module).with_suffix(".yaml").read_text("utf8"), Loader=loader)


class _Rejected(Exception):
    """A document is valid YAML but over a limit."""


def _check_depth(events: Any) -> None:
    import yaml

    depth = 0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise _Rejected(_DEEP)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_size(node: Any) -> None:
    """Counts the values of the document with its aliases expanded. A document without aliases has no limit."""
    sizes: dict[int, int] = {}

    def size(part: Any) -> int:
        if id(part) in sizes:
            if not sizes[id(part)]:
                raise _Rejected("an alias contains itself")
            return sizes[id(part)]
        sizes[id(part)] = 0  # in progress
        sizes[id(part)] = 1 + sum(size(child) for child in _children(part))
        return sizes[id(part)]

    whole = size(node)
    if whole > max(MOST, len(sizes)):
        raise _Rejected(f"its aliases expand to {whole:.3g} values; the limit is {MOST:,}")


def _check_keys(node: Any) -> None:
    """Rejects duplicate keys, of which PyYAML silently keeps the last."""
    import yaml

    todo, seen = [node], {id(node)}
    while todo:
        part = todo.pop()
        if isinstance(part, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key, _ in part.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if name in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' appears twice", key.start_mark
                    )
                if name is not None and name[0] != "tag:yaml.org,2002:merge":
                    keys.add(name)
        children = [child for child in _children(part) if id(child) not in seen]
        seen |= {id(child) for child in children}
        todo += children


def _children(node: Any) -> list[Any]:
    if not isinstance(node.value, list):
        return []
    return [part for each in node.value for part in (each if isinstance(each, tuple) else (each,))]


# Plain texts for pydantic's errors about parsing and types.
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


def explain(error: Mapping[str, Any]) -> str:
    """States what a value must be, from one of `ValidationError.errors()`. Messages of diptych's validators stay."""
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
    """The first error in a file, with its place; all missing keys count as one. A misspelled key or choice comes with
    the nearest valid one."""
    errors: list[Any] = list(error.errors())
    # A misspelled required key is also reported as missing; the misspelling is the cause.
    unknown = [each for each in errors if each["type"] == "extra_forbidden" or "[key]" in each["loc"]]
    problem = (unknown or errors)[0]
    place = [str(part) for part in problem["loc"] if part != "[key]"]
    where = ".".join(place) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"{where}: no such key{nearest(place[-1], keys)}"
    if problem["type"] == "missing":
        absent = [".".join(map(str, each["loc"])) for each in errors if each["type"] == "missing"]
        return f"{', '.join(absent)}: missing"
    words = re.findall(r"'([^']*)'", str(problem.get("ctx", {}).get("expected", "")))
    hint = nearest(str(problem["input"]), words)
    if "[key]" in problem["loc"]:
        return f"{where}: no such key; keys here are {', '.join(words)}{hint}"
    return f"{where}: {explain(problem)}{hint}"


def size(count: float) -> str:
    """A number of bytes as text: `20 MiB`, `10.2 KiB`."""
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 / 2 else f"{count / 2**10:.3g} KiB"


# Text files that people wrote (captions, prompts, JSONL, CSV, YAML, word lists) are read here only. They are UTF-8,
# with or without a byte order mark. Other encodings are rejected: a wrong guess would put wrong letters into prompts.

MARK = "\ufeff"  # a decoded byte order mark
# The longer marks come first: that of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_FOREIGN = 1 / 3  # share of bytes above 127 from which a line is unlikely to be Western European text in Latin-1


def read_text(path: Path) -> str:
    """Reads a text file, with line ends as `\\n`. UsageError if it is not UTF-8, UserError if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        code = "path_not_found" if isinstance(error, FileNotFoundError) else "path_unreadable"
        raise UserError(code, f"{path}: cannot be read ({error.strerror or error})") from error
    return decode(data, str(path))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without their ends. Raises as `read_text` does.

    Other Unicode line separators stay inside a line, because JSON strings may contain them.
    """
    lines = read_text(path).split("\n")
    return lines if lines[-1] else lines[:-1]


def stream_lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """`read_lines` from an open file, which may be larger than memory."""
    for number, raw in enumerate(stream, 1):
        # A UTF-16 file has its mark only at its start.
        yield from decode(raw, name, number).removesuffix("\n").split("\n")


def decode(data: bytes, name: str, line: int = 1) -> str:
    """Bytes as text, without byte order marks; `name` and `line` are their source. UsageError if not UTF-8."""
    nul = data.find(0)
    try:
        text, at = data.decode("utf-8-sig"), nul
    except UnicodeDecodeError as error:
        text, at = "", min(error.start, nul) if nul >= 0 else error.start
    if at < 0:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        # Concatenated files have a mark at the start of each.
        return text.lstrip(MARK).replace(f"\n{MARK}", "\n")
    start = data.rfind(b"\n", 0, at) + 1
    encoding, code = _guess(data, data[start:].partition(b"\n")[0], line == 1)
    raise UsageError(
        "file_format_unknown",
        f"{name}, line {line + data[:at].count(10)}, byte {at - start + 1}: not UTF-8 but probably {encoding}. "
        f"Save the file as UTF-8, for example with: iconv -f {code} -t UTF-8 OLD > NEW",
    )


def _guess(data: bytes, row: bytes, is_start: bool) -> tuple[str, str]:
    """The likely encoding of text that is not UTF-8, and iconv's name for it. `row` is the first such line."""
    for mark, name in _MARKS.items() if is_start else ():
        if data.startswith(mark):
            return name, name
    if b"\0" in data:
        wide = data.count(0) > len(data) / 4
        return ("UTF-16", "UTF-16LE" if data[1:2] == b"\0" else "UTF-16BE") if wide else ("binary data", "ENCODING")
    if sum(byte > 127 for byte in row) > _FOREIGN * len(row):
        return "an East Asian or Cyrillic encoding", "ENCODING"
    return "Latin-1 (Windows-1252)", "WINDOWS-1252"
