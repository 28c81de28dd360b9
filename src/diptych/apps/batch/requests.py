"""Requests of a batch: one for every reference with every prompt with every seed of a row, each with its own file.

The command line is one row; a JSONL file has one row per line. A folder stands for the images in it.
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
"""Arguments of `Student.generate` that a row may have."""
KEYS = ("reference", "prompt", "seed", "out", *OPTIONS)


@dataclass(frozen=True)
class Request:
    """One image to generate. `options` holds only the given ones, `row` counts from 1, and `original_prompt` is the
    user's prompt where `prompt` is an enhanced one."""

    reference: Path | None
    prompt: str
    seed: int
    options: dict[str, Any]
    row: int
    out: Path = Path()
    original_prompt: str = ""

    def as_row(self) -> dict[str, Any]:
        """Returns the request as a JSON object."""
        names = {"row": self.row, "out": str(self.out), "reference": self.reference and str(self.reference)}
        return {**names, "prompt": self.prompt, "seed": self.seed, **self.options}


@dataclass(frozen=True)
class BatchPlan:
    """Requests, each with its file. `folder` holds all files; it is None for a single named file."""

    requests: list[Request]
    folder: Path | None


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, row) of a JSONL file without blank lines. UsageError names a line that is not a JSON object."""
    for line, raw in enumerate(read_lines(path), 1):
        if not raw.strip():
            continue
        try:
            row = parse_json(raw)
        except (ValueError, RecursionError) as error:
            raise UsageError("json_invalid", f"{path}:{line}: not JSON ({error}); write one object per line") from error
        if not isinstance(row, dict):
            raise UsageError("row_invalid", f"{path}:{line}: must be a JSON object, not a {type(row).__name__}")
        yield line, row


def check_row(row: dict[str, Any], where: str) -> None:
    """Raises UsageError, prefixed by `where`, for unknown or missing keys and for values that no model accepts."""
    for key in row:
        if key not in KEYS:
            hint = nearest(key, KEYS) or f"; known keys are {', '.join(KEYS)}"
            raise UsageError("row_invalid", f"{where}unknown key '{key}'{hint}")
    if "reference" not in row:
        raise UsageError("row_invalid", f"{where}the key 'reference' is missing: an image of your subject")
    if "prompt" not in row:
        raise UsageError("row_invalid", f"{where}the key 'prompt' is missing: what the new image shows")
    try:
        for text in as_list(row["prompt"]):
            check_prompt(text)
        for number in as_list(row.get("seed", 0)):
            check_seed(number)
        for place in as_list(row["reference"]):
            if not isinstance(place, (str, Path, type(None))) or place == "":
                raise UsageError("row_invalid", f"reference must be an image file or a folder, not {place!r}")
        out = row.get("out", "x")
        if not isinstance(out, str) or not out or Path(out).is_absolute() or ".." in Path(out).parts:
            raise UsageError("row_invalid", f"out must be a file name inside the --out folder, not {out!r}")
        check_options(_options(row))
    except UsageError as error:
        raise UsageError(error.code, f"{where}{error}") from None


def multiply(row: dict[str, Any], number: int, here: Path, where: str = "") -> Iterator[Request]:
    """Yields every reference with every prompt with every seed; the seed changes fastest."""
    options = _options(row)
    references = [path for place in as_list(row["reference"]) for path in _images(place, here, where)]
    combined = itertools.product(references, as_list(row["prompt"]), as_list(row.get("seed", 0)))
    out = Path(row.get("out", ""))
    for reference, prompt, seed in combined:
        yield Request(reference, prompt, seed, options, number, out)


def _images(place: str | Path | None, here: Path, where: str) -> list[Path | None]:
    """The file itself, or a folder's images by name; a warning names the files left out (`pictures_in`)."""
    if place is None:
        return [None]
    path = here / here_or_packaged(Path(place).expanduser())
    if not path.is_dir():
        return [refuse_special(path) if where else path]  # a shell may pass a pipe; a row of a file may not
    images = pictures_in(path)
    if not images:
        raise UsageError("image_not_found", f"{where}{path}: no images in this folder ({', '.join(READ)})")
    return list(images)


def _options(row: dict[str, Any]) -> dict[str, Any]:
    given = {key: row[key] for key in OPTIONS if row.get(key) is not None}
    return {key: read_size(value) if key == "size" else value for key, value in given.items()}


PATTERN = "{reference}-{prompt}-{seed}.png"
WIDTH = r"0?\d?\d?[dx]?"  # allowed after a field's colon: the width of a number
FIELDS = ("reference", "prompt", "seed", "row")
PART_BYTES = 80  # of a file name, for the reference and for the prompt each; file systems limit a name to 255
_OTHER_KINDS = tuple(suffix for suffix in READ if suffix not in KINDS)


def name_all(requests: Sequence[Request], out: str | Path | None, *, alone: bool = True) -> BatchPlan:
    """Gives each request its file. No two share one; with the built-in pattern the later one gets a digest added."""
    text = str(out) if out is not None else ""
    if "{" not in text and not text.endswith("/") and not Path(text).is_dir() and text:
        suffix = Path(text).suffix.lower()
        if suffix in _OTHER_KINDS:
            kind_of(text)
        if suffix in KINDS:
            if len(requests) > 1 or not alone:
                raise UsageError(
                    "output_collision",
                    f"{text} is one file for {len(requests)} images. Pass a folder, or a pattern such as '{PATTERN}'.",
                )
            return BatchPlan([replace(requests[0], out=Path(text))], None)
    if not text:
        if len(requests) > 1 or not alone:
            raise UsageError("option_missing", f"{len(requests)} images need a folder: pass --out DIR")
        return BatchPlan([replace(requests[0], out=Path("diptych.png"))], None)
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
                "output_collision",
                f"rows {first.row} and {request.row} would both be written to {request.out}. Use more fields in the "
                f'pattern ({", ".join(FIELDS)}), or give each row its "out".',
            )
        taken.setdefault(_key(request.out), request)  # an image that is requested twice is generated once
    return BatchPlan(list(taken.values()), folder)


def _same(first: Request, second: Request) -> bool:
    return _digest(first) == _digest(second)


def _digest(request: Request) -> str:
    return sha256_json({key: value for key, value in request.as_row().items() if key not in ("row", "out")})


def _key(path: Path) -> str:
    return str(path).casefold()  # some file systems ignore case


def _check_pattern(pattern: str) -> None:
    try:
        parsed = [(name, spec) for _, name, spec, _ in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise UsageError("option_invalid", f"--out {pattern}: {error}. Write fields as {{reference}}.") from error
    for name, spec in parsed:
        if not re.fullmatch(WIDTH, spec or ""):
            raise UsageError("option_invalid", f"--out {pattern}: format '{spec}' of {{{name}}} is not a width, as 04d")
        if name not in FIELDS:
            hint = nearest(name, FIELDS) or f"; known fields are {', '.join(FIELDS)}"
            raise UsageError("option_invalid", f"--out {pattern}: unknown field {{{name}}}{hint}")


def _fill(pattern: str, request: Request) -> str:
    reference = request.reference.stem if request.reference is not None else "text"
    fields = {"reference": _part(reference), "prompt": _part(request.prompt), "seed": request.seed, "row": request.row}
    try:
        return pattern.format(**fields)
    except ValueError as error:
        raise UsageError("option_invalid", f"--out {pattern}: {error}") from error


def _part(text: str) -> str:
    """A text as part of a file name: letters, digits and hyphens. A long one is cut and gets a digest."""
    slug = re.sub(r"[^\w]+", "-", text).strip("-") or "x"
    if len(slug.encode()) <= PART_BYTES:
        return slug
    cut = slug.encode()[: PART_BYTES - 7].decode(errors="ignore").rstrip("-")
    return f"{cut}-{sha256(text)[:6]}"
