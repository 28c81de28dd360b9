"""What is asked for, as requests: one for every reference with every prompt with every seed of a row; and the file that
each is drawn into, which no other request may share.

The command's own words are one row, a JSONL file has one a line; a folder stands for the pictures in it.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diptych.data.formats import READ, pictures_in
from diptych.data.images import KINDS, kind_of
from diptych.errors import UsageError, nearest
from diptych.student import sampling
from diptych.student.sampling import as_list, check_options, check_prompt, check_seed, read_size
from diptych.utils.documents import parse_json, read_lines
from diptych.utils.io import sha256, sha256_json
from diptych.utils.paths import here_or_packaged, refuse_special

OPTIONS = tuple(name for name in sampling.OPTIONS if name != "null_panel")
"""Arguments of `Student.generate` that a row may give."""
KEYS = ("reference", "prompt", "seed", "out", *OPTIONS)


@dataclass(frozen=True)
class Request:
    """One picture that is asked for. `options` holds only what was asked; `row` counts from 1. `asked_prompt` is what
    the user wrote, where `prompt` says more."""

    reference: Path | None
    prompt: str
    seed: int
    options: dict[str, Any]
    row: int
    out: Path = Path()
    asked_prompt: str = ""

    def told(self) -> dict[str, Any]:
        """It, to be written down."""
        named = {"row": self.row, "out": str(self.out), "reference": self.reference and str(self.reference)}
        return {**named, "prompt": self.prompt, "seed": self.seed, **self.options}


@dataclass(frozen=True)
class Plan:
    """The requests, each with its file; `folder` holds them all and is None for one picture with a name of its own."""

    requests: list[Request]
    folder: Path | None


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a JSONL file; blank lines are left out. UsageError names the line that is not such a row."""
    for line, raw in enumerate(read_lines(path), 1):
        if not raw.strip():
            continue
        try:
            row = parse_json(raw)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{line}: not JSON ({error}); one object a line") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{line}: not a JSON object but a {type(row).__name__}")
        yield line, row


def check_row(row: dict[str, Any], where: str) -> None:
    """UsageError, `where` before it, for unknown keys, missing ones, and values that no model could take."""
    for key in row:
        if key not in KEYS:
            raise UsageError(f"{where}unknown key '{key}'{nearest(key, KEYS)}; known are {', '.join(KEYS)}")
    if "reference" not in row:
        raise UsageError(f"{where}missing a reference, the picture of your subject")
    if "prompt" not in row:
        raise UsageError(f"{where}missing a prompt: what the new picture shows")
    try:
        for text in as_list(row["prompt"]):
            check_prompt(text)
        for number in as_list(row.get("seed", 0)):
            check_seed(number)
        for place in as_list(row["reference"]):
            if not isinstance(place, (str, Path, type(None))) or place == "":
                raise UsageError(f"a reference is an image file or a folder of them, not {place!r}")
        out = row.get("out", "x")
        if not isinstance(out, str) or not out or Path(out).is_absolute() or ".." in Path(out).parts:
            raise UsageError(f"out is a file's name inside the --out folder, not {out!r}")
        check_options({key: read_size(value) if key == "size" else value for key, value in _options(row).items()})
    except UsageError as error:
        raise UsageError(f"{where}{error}") from None


def multiply(row: dict[str, Any], number: int, here: Path, where: str = "") -> Iterator[Request]:
    """Every reference with every prompt with every seed, seeds running fastest."""
    options = {key: read_size(value) if key == "size" else value for key, value in _options(row).items()}
    references = [path for place in as_list(row["reference"]) for path in _pictures(place, here, where)]
    combined = itertools.product(references, as_list(row["prompt"]), as_list(row.get("seed", 0)))
    out = Path(row.get("out", ""))
    for reference, prompt, seed in combined:
        yield Request(reference, prompt, seed, options, number, out)


def _pictures(place: str | Path | None, here: Path, where: str) -> list[Path | None]:
    """The file itself, or a folder's pictures by name; what is left out is named in a warning (`pictures_in`)."""
    if place is None:
        return [None]
    path = here / here_or_packaged(Path(place).expanduser())
    if not path.is_dir():
        return [refuse_special(path) if where else path]  # a shell may give a pipe; a file's row may not
    found = pictures_in(path)
    if not found:
        raise UsageError(f"{where}{path}: no pictures in this folder ({', '.join(READ)})")
    return list(found)


def _options(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in OPTIONS if row.get(key) is not None}


PATTERN = "{reference}-{prompt}-{seed}.png"
WIDTH = r"0?\d?\d?[dx]?"  # what may stand after a field's colon: the width of a number
FIELDS = ("reference", "prompt", "seed", "row")
PART_BYTES = 80  # of a file's name, for a reference and for a prompt each; file systems end a name at 255
_OTHER_KINDS = tuple(suffix for suffix in READ if suffix not in KINDS)


def name_all(requests: Sequence[Request], out: str | Path | None, *, alone: bool = True) -> Plan:
    """Each request with its file. Two may not share one; with the built-in pattern the later gets a digest added."""
    text = str(out) if out is not None else ""
    if "{" not in text and not text.endswith("/") and not Path(text).is_dir() and text:
        suffix = Path(text).suffix.lower()
        if suffix in _OTHER_KINDS:
            kind_of(text)
        if suffix in KINDS:
            if len(requests) > 1 or not alone:
                raise UsageError(
                    f"{text} is one file for {len(requests)} pictures; name a folder, or a pattern such as '{PATTERN}'"
                )
            return Plan([replace(requests[0], out=Path(text))], None)
    if not text:
        if len(requests) > 1 or not alone:
            raise UsageError(f"{len(requests)} pictures need a folder to lie in: --out DIR")
        return Plan([replace(requests[0], out=Path("diptych.png"))], None)
    pattern = text if "{" in text else f"{text.rstrip('/')}/{PATTERN}"
    _check_pattern(pattern)
    folder = Path(pattern[: pattern.index("{")] + "x").parent
    taken: dict[str, Request] = {}
    for unnamed in requests:
        request = replace(unnamed, out=folder / unnamed.out if unnamed.out.name else Path(_fill(pattern, unnamed)))
        kind_of(request.out)
        first = taken.get(_key(request.out))
        if first is not None and not _same(first, request) and not unnamed.out.name and "{" not in text:
            request = replace(request, out=request.out.with_stem(f"{request.out.stem}-{_digest(request)[:6]}"))
            first = taken.get(_key(request.out))
        if first is not None and not _same(first, request):
            raise UsageError(
                f"rows {first.row} and {request.row} would both be {request.out}; use more of the pattern's fields "
                f'({", ".join(FIELDS)}), or give each row an "out" of its own'
            )
        taken.setdefault(_key(request.out), request)  # the very same picture, asked for twice, is drawn once
    return Plan(list(taken.values()), folder)


def _same(first: Request, second: Request) -> bool:
    return _digest(first) == _digest(second)


def _digest(request: Request) -> str:
    told = {key: value for key, value in request.told().items() if key not in ("row", "out")}
    return sha256_json(told)


def _key(path: Path) -> str:
    return str(path).casefold()  # some file systems do not tell capitals from small letters


def _check_pattern(pattern: str) -> None:
    try:
        parsed = [(name, spec) for _, name, spec, _ in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise UsageError(f"--out {pattern}: {error}; fields are written as {{reference}}") from error
    names = [name for name, _ in parsed]
    for name, spec in parsed:
        if not re.fullmatch(WIDTH, spec or ""):
            raise UsageError(f"--out {pattern}: Invalid format '{spec}' of {{{name}}}: a width such as 04d is allowed")
    for name in names:
        if name not in FIELDS:
            known = ", ".join(f"{{{known}}}" for known in FIELDS)
            raise UsageError(f"--out {pattern}: unknown field {{{name}}}{nearest(name, FIELDS)}; known are {known}")


def _fill(pattern: str, request: Request) -> str:
    reference = request.reference.stem if request.reference is not None else "text"
    fields = {"reference": _part(reference), "prompt": _part(request.prompt), "seed": request.seed, "row": request.row}
    try:
        return pattern.format(**fields)
    except ValueError as error:
        raise UsageError(f"--out {pattern}: {error}") from error


def _part(text: str) -> str:
    """A text as part of a file's name: letters, digits and hyphens. A long one is cut, and told apart by a digest."""
    slug = re.sub(r"[^\w]+", "-", text).strip("-") or "x"
    if len(slug.encode()) <= PART_BYTES:
        return slug
    cut = slug.encode()[: PART_BYTES - 7].decode(errors="ignore").rstrip("-")
    return f"{cut}-{sha256(text)[:6]}"
