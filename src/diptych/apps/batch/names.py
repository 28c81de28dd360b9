"""What each picture is called: the file that a request is drawn into, which no other request may share."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diptych.apps.batch.requests import Plan, Request
from diptych.data.formats import READ
from diptych.data.images import KINDS, kind_of
from diptych.errors import UsageError, nearest

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
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


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
    return f"{cut}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
