"""Many pictures from one command: which ones, what each is called, which are there already, and which failed.

What is asked for is rows: the command's own words are one row, a JSONL file has one a line. References, prompts and
seeds of a row multiply; a folder stands for the pictures in it. Every picture carries a digest of its request: weights,
reference, prompt, seed, options. So the same command, interrupted or run again, draws only what is missing or was asked
for differently. A request that fails is noted in `failed.jsonl`, and the rest goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data.images import KINDS, READ, check_image, kind_of, open_image, read_provenance, save_image
from diptych.data.store import write_atomic
from diptych.errors import UsageError, UserError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.api import Student
    from diptych.console import Display

OPTIONS = (
    "steps",
    "guidance",
    "image_guidance",
    "text_guidance",
    "negative_prompt",
    "size",
    "fit",
    "background",
)
"""Arguments of `Student.generate` that a row may give."""
KEYS = ("reference", "prompt", "seed", "out", *OPTIONS)
PATTERN = "{reference}-{prompt}-{seed}.png"
FIELDS = ("reference", "prompt", "seed", "row")
FAILED = "failed.jsonl"
PART_BYTES = 80  # of a file's name, for a reference and for a prompt each; file systems end a name at 255
_OTHER_KINDS = tuple(suffix for suffix in READ if suffix not in KINDS)


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


@dataclass
class Outcome:
    """What came of a plan. `drawn`: file and provenance of each new picture; `failed`: what `failed.jsonl` says."""

    drawn: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)


# What is asked for ---------------------------------------------------------------------------------------------------


def plan(asked: dict[str, Any], jobs: str | Path | None, out: str | Path | None) -> Plan:
    """The requests of `asked` (a row), or of a JSONL file whose rows take from `asked` what they do not say.

    `out` is a file for one picture, else a folder or a pattern with `FIELDS` in braces. Nothing is read but the JSONL
    file and the names in folders. UsageError for anything that no model could do.
    """
    said = {key: value for key, value in asked.items() if value is not None}
    if jobs is None:
        check_row(said, "")
        requests = list(multiply(said, 1, Path()))
    else:
        requests = []
        for line, row in read_rows(Path(jobs)):
            check_row(said | row, f"{jobs}:{line}: ")
            # The file's own references are relative to it; the command's to where it runs.
            here = Path(jobs).parent if "reference" in row else Path()
            requests += multiply(said | row, line, here, f"{jobs}:{line}: ")
        if not requests:
            raise UsageError(f"{jobs} has no rows; one JSON object a line, with reference and prompt")
    return name_all(requests, out, alone=jobs is None)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a JSONL file; blank lines are left out. UsageError names the line that is no such row."""
    try:
        text = path.read_text("utf8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file in UTF-8") from error
    for line, raw in enumerate(text.splitlines(), 1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except ValueError as error:
            raise UsageError(f"{path}:{line}: not JSON ({error}); one object a line") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{line}: not a JSON object but a {type(row).__name__}")
        yield line, row


def check_row(row: dict[str, Any], where: str) -> None:
    """UsageError, `where` before it, for unknown keys, missing ones, and values that no model could take."""
    from diptych.api import check_options, check_prompt, check_seed

    for key in row:
        if key not in KEYS:
            raise UsageError(f"{where}unknown key '{key}'{nearest(key, KEYS)}; known are {', '.join(KEYS)}")
    if "reference" not in row:
        raise UsageError(f"{where}missing a reference, the picture of your subject")
    if "prompt" not in row:
        raise UsageError(f"{where}missing a prompt: what the new picture shows")
    try:
        for text in _listed(row["prompt"]):
            check_prompt(text)
        for number in _listed(row.get("seed", 0)):
            check_seed(number)
        for place in _listed(row["reference"]):
            if not isinstance(place, (str, Path, type(None))) or place == "":
                raise UsageError(f"a reference is an image file or a folder of them, not {place!r}")
        out = row.get("out", "x")
        if not isinstance(out, str) or not out or Path(out).is_absolute() or ".." in Path(out).parts:
            raise UsageError(f"out is a file's name inside the --out folder, not {out!r}")
        check_options({key: _size(value) if key == "size" else value for key, value in _options(row).items()})
    except UsageError as error:
        raise UsageError(f"{where}{error}") from None


def multiply(row: dict[str, Any], number: int, here: Path, where: str = "") -> Iterator[Request]:
    """Every reference with every prompt with every seed, seeds running fastest."""
    options = {key: _size(value) if key == "size" else value for key, value in _options(row).items()}
    references = [path for place in _listed(row["reference"]) for path in _pictures(place, here, where)]
    combined = itertools.product(references, _listed(row["prompt"]), _listed(row.get("seed", 0)))
    out = Path(row.get("out", ""))
    for reference, prompt, seed in combined:
        yield Request(reference, prompt, seed, options, number, out)


def _pictures(place: str | Path | None, here: Path, where: str) -> list[Path | None]:
    """The file itself, or a folder's pictures by name; those that are hidden or deeper down are left out."""
    if place is None:
        return [None]
    path = here / Path(place).expanduser()
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in READ and p.name[0] != "." and p.is_file())
    if not found:
        raise UsageError(f"{where}{path}: no pictures in this folder ({', '.join(READ)})")
    return list(found)


def _options(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in OPTIONS if row.get(key) is not None}


def _size(value: Any) -> Any:
    """`64`, `"64"`, `"512x768"` (width first) or `[512, 768]` as a number or a pair."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        return value
    parts = value.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"size {value}: give pixels, for instance 512 or 512x768")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _listed(value: Any) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise UsageError("an empty list was given; give at least one reference, prompt and seed")
    return values


# What each is called -------------------------------------------------------------------------------------------------


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
        names = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise UsageError(f"--out {pattern}: {error}; fields are written as {{reference}}") from error
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


# What is there already -----------------------------------------------------------------------------------------------


def identify(loading: dict[str, Any]) -> dict[str, Any]:
    """What tells the weights that `Student.load` is to open from others, wherever they lie.

    The rest of its arguments are kept as they are, but for the device: a picture is not drawn again because another
    machine goes on.
    """
    from diptych.models import BUILT_IN, with_scale
    from diptych.student import speed as speeds

    told = {key: value for key, value in loading.items() if value not in (None, [], ()) and key != "device"}
    if told.get("model") in BUILT_IN:
        told.setdefault("base", told["model"])
    quick = speeds.parse(told.get("speed"), told.get("switches", ()))
    if quick.few_step_lora:
        told["switches"] = [s for s in told["switches"] if speeds.name_of(s) != "few_step_lora"]
        told["few_step_lora"] = _weights(with_scale(quick.few_step_lora), None)
    roles = {"model": "student", "base": "teacher", "lora": None}
    return {key: _weights(value, roles[key]) if key in roles else value for key, value in told.items()}


def _weights(value: Any, role: str | None) -> Any:
    """A digest of a model or LoRA file or folder; above 2 GiB of names, sizes and times, as hashing takes minutes."""
    from diptych.api import HASHED_BYTES
    from diptych.models import fingerprint, resolve

    if isinstance(value, (list, tuple)):
        return [_weights(item, role) for item in value]
    if not isinstance(value, (str, Path)):
        return value
    path = resolve(str(value), role) if role else Path(value).expanduser()
    if not path.exists():
        return str(value)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if sum(p.stat().st_size for p in files) <= HASHED_BYTES:
        return fingerprint(path)
    stats = [(str(p.relative_to(path)) if path.is_dir() else p.name, p.stat()) for p in files]
    told = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def request_digest(request: Request, weights: dict[str, Any], reference: str | None) -> str:
    """sha256 over everything that was asked for, `reference` being the sha256 of that file."""
    asked = {"prompt": request.prompt, "seed": request.seed, **request.options}
    whole = {"weights": weights, "reference": reference, **asked}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def _is_there(request: Request, digest: str) -> bool:
    """Whether this very picture lies there. UsageError if something lies there that no request made."""
    if not request.out.exists():
        return False
    try:
        made = read_provenance(request.out)
    except UserError:
        made = None
    if made is None or "request" not in made:
        raise UsageError(f"{request.out} is there and was not drawn by this command; name another --out")
    return made["request"] == digest


# Drawing -------------------------------------------------------------------------------------------------------------


def draw(
    plan: Plan,
    loading: dict[str, Any],
    load: Callable[[], Student],
    display: Display,
    *,
    writes: bool = True,
    preview: Path | None = None,
) -> Outcome:
    """Draws what of a plan is not there yet.

    References are looked at before the model is loaded, and it is not loaded if nothing is to be drawn. One picture
    alone fails as itself; among several, a UserError costs that one only, and `folder/failed.jsonl` says why.

    Args:
        loading: the arguments of `Student.load` that `load` uses; see `identify`.
        load: opens the student.
        writes: False in the processes that only share the work of one that writes.
        preview: a picture file that is rewritten while a picture is being drawn.
    """
    outcome, requests = Outcome(), plan.requests
    looked = _look_at(requests, outcome)
    references = {r.reference.resolve() for r in requests if r.reference is not None}
    for path in [r.out for r in requests] + ([preview] if preview else []):
        if path.resolve() in references:
            raise UsageError(f"{path} is a reference itself; name another file to write")
    weights = identify(loading) if looked else {}
    pending: list[tuple[Request, dict[str, Any]]] = []
    for request, reference in looked:
        digest = request_digest(request, weights, reference)
        if plan.folder is not None and _is_there(request, digest):
            outcome.skipped.append(request.out)
        else:
            told = (
                {"reference_file": request.reference.name, "reference_sha256": reference} if request.reference else {}
            )
            own = {"asked_prompt": request.asked_prompt} if request.asked_prompt else {}
            pending.append((request, {**told, **own, "request": digest}))
    if writes:
        _note_failed(plan, outcome)
    if pending:
        student = load()
        with display.stage("drawing", "steps" if len(requests) == 1 else "pictures") as report:
            _draw_all(pending, student, outcome, plan, report, writes, preview)
    return outcome


def _look_at(requests: Sequence[Request], outcome: Outcome) -> list[tuple[Request, str | None]]:
    """(request, sha256 of its reference); those whose reference cannot be used go to `outcome.failed`."""
    seen: dict[Path, str | UserError] = {}
    fine: list[tuple[Request, str | None]] = []
    for request in requests:
        path = request.reference
        if path is None:
            fine.append((request, None))
            continue
        if path not in seen:
            try:
                seen[path] = check_image(path)
            except UserError as error:
                seen[path] = error
        found = seen[path]
        if isinstance(found, str):
            fine.append((request, found))
        elif len(requests) == 1:
            raise found
        else:
            outcome.failed.append({**request.told(), "reason": str(found)})
    return fine


def _draw_all(
    pending: Sequence[tuple[Request, dict[str, Any]]],
    student: Student,
    outcome: Outcome,
    plan: Plan,
    report: Callable[..., None],
    writes: bool,
    preview: Path | None,
) -> None:
    several = len(plan.requests) > 1
    opened: tuple[Any, Image | None] = (None, None)  # the last reference, so that the pipeline can tell a repeated one
    for done, (request, told) in enumerate(pending):

        def on_step(pipe: Any, step: int, timestep: Any, tensors: Any, done: int = done) -> None:
            steps = pipe.num_timesteps
            if several:
                report(done, len(pending), f"step {step + 1}/{steps}")
            else:
                report(step + 1, steps)

        options: dict[str, Any] = {**request.options, "callback_on_step_end": on_step}
        if preview is not None and writes:
            options["on_preview"] = lambda _done, _steps, images: save_image(images[0], preview)
        try:
            key = (request.reference, request.options.get("background"))
            if opened[0] != key:
                over = {"background": key[1]} if key[1] else {}
                opened = (key, open_image(request.reference, **over) if request.reference else None)
            image = student.generate(opened[1], request.prompt, seed=request.seed, **options)
        except UserError as error:
            if not several:
                raise
            outcome.failed.append({**request.told(), "reason": str(error)})
            if writes:
                _note_failed(plan, outcome)
            continue
        if writes:
            provenance = {**image.info, **told}
            outcome.drawn.append((save_image(image, request.out, provenance), provenance))
        if several:
            report(done + 1, len(pending))


def _note_failed(plan: Plan, outcome: Outcome) -> None:
    """`failed.jsonl`, whole: what failed in this call. Removed when nothing did."""
    if plan.folder is None:
        return
    path = plan.folder / FAILED
    if not outcome.failed:
        path.unlink(missing_ok=True)
        return
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in outcome.failed).encode())


def counted(outcome: Outcome) -> str:
    """`3 drawn, 2 there already, 1 failed`."""
    counts = Counter(drawn=len(outcome.drawn), skipped=len(outcome.skipped), failed=len(outcome.failed))
    words = {"drawn": "drawn", "skipped": "there already", "failed": "failed"}
    return ", ".join(f"{counts[key]} {word}" for key, word in words.items() if counts[key] or key == "drawn")
