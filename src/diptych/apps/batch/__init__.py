"""Many pictures from one command: which ones, what each is called, which are there already, and which failed.

What is asked for is rows, and each of their pictures has a file of its own (`requests`). Every picture
carries a digest of its request: weights, reference, prompt, seed, options. So the same command, interrupted or run
again, draws only what is missing or was asked for differently. A request that fails is noted in `failed.jsonl`, and the
rest goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.apps.batch.requests import Plan, Request, check_row, multiply, name_all, read_rows
from diptych.data.engine import Engine, LocalEngine
from diptych.data.images import check_image, open_image, read_provenance, save_image
from diptych.errors import UsageError, UserError
from diptych.utils.io import check_writable, sha256_json, write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.apps.student import Student
    from diptych.utils.console import Display

FAILED = "failed.jsonl"
Pending = tuple[Request, dict[str, Any]]  # what is to be drawn, and what its file will say beside what the student says


@dataclass
class Outcome:
    """What came of a plan. `drawn`: file and provenance of each new picture; `failed`: what `failed.jsonl` says."""

    drawn: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)


def plan(asked: dict[str, Any], jobs: str | Path | None, out: str | Path | None) -> Plan:
    """The requests of `asked` (a row), or of a JSONL file whose rows take from `asked` what they do not say.

    `out` is a file for one picture, else a folder or a pattern with `requests.FIELDS` in braces. Nothing is read but
    the JSONL file and the names in folders. UsageError for anything that no model could do.
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


# What is there already -----------------------------------------------------------------------------------------------


def identify(loading: dict[str, Any]) -> dict[str, Any]:
    """What tells the weights that `Student.load` is to open from others, wherever they lie.

    The rest of its arguments are kept as they are, but for the device: a picture is not drawn again because another
    machine goes on.
    """
    from diptych.student.runtime import speed as speeds
    from diptych.utils.models import BUILT_IN, with_scale

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
    from diptych.utils.models import HASHED_BYTES, fingerprint, resolve

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
    return sha256_json(told, sort_keys=False)


def request_digest(request: Request, weights: dict[str, Any], reference: str | None) -> str:
    """sha256 over everything that was asked for, `reference` being the sha256 of that file."""
    asked = {"prompt": request.prompt, "seed": request.seed, **request.options}
    whole = {"weights": weights, "reference": reference, **asked}
    return sha256_json(whole, default=str)


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
    engine: Engine | None = None,
) -> Outcome:
    """Draws what of a plan is not there yet.

    References are looked at before the model is loaded, and it is not loaded if nothing is to be drawn. One picture
    alone fails as itself; among several, a UserError costs that one only, and `folder/failed.jsonl` says why.

    Args:
        loading: the arguments of `Student.load` that `load` uses; see `identify`.
        load: opens the student.
        writes: False in the processes that only share the work of one that writes.
        preview: a picture file that is rewritten while a picture is being drawn.
        engine: a cluster's, whose workers draw; they open the student by `loading`. Otherwise this process does.
    """
    outcome, requests = Outcome(), plan.requests
    looked = _look_at(requests, outcome)
    references = {r.reference.resolve() for r in requests if r.reference is not None}
    for path in [r.out for r in requests] + ([preview] if preview else []):
        if path.resolve() in references:
            raise UsageError(f"{path} is a reference itself; name another file to write")
    weights = identify(loading) if looked else {}
    pending: list[Pending] = []
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
        for folder in {request.out.parent for request, _ in pending}:
            check_writable(folder)  # before minutes of loading and drawing
        _note_failed(plan, outcome)
    if pending:
        several = len(requests) > 1
        cluster = None if engine is None or isinstance(engine, LocalEngine) else engine
        student = load() if cluster is None else None
        with display.stage("drawing", "pictures" if several else "steps") as report:
            if cluster is not None:
                pictures = _there(pending, loading, report, cluster)
            else:
                assert student is not None
                pictures = _here(pending, student, report, several, preview if writes else None)
            _keep(pending, pictures, outcome, plan, report, writes)
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


def _here(
    pending: Sequence[Pending],
    student: Student,
    report: Callable[..., None],
    several: bool,
    preview: Path | None,
) -> Iterator[tuple[int, Image | UserError]]:
    """(index, its picture or why there is none) of each, in order, drawn in this process."""
    opened: tuple[Any, Image | None] = (None, None)  # the last reference, so that the pipeline can tell a repeated one
    for done, (request, _) in enumerate(pending):

        def on_step(pipe: Any, step: int, timestep: Any, tensors: Any, done: int = done) -> None:
            steps = pipe.num_timesteps
            if several:
                report(done, len(pending), f"step {step + 1}/{steps}")
            else:
                report(step + 1, steps)

        options: dict[str, Any] = {"callback_on_step_end": on_step}
        if preview is not None:
            options["on_preview"] = lambda _done, _steps, images: save_image(images[0], preview)
        try:
            key = (request.reference, request.options.get("background"))
            if opened[0] != key:
                opened = (key, _reference(request))
            picture = _picture(student, opened[1], request, **options)
        except UserError as error:
            picture = error
        yield done, picture


def _reference(request: Request) -> Image | None:
    if request.reference is None:
        return None
    background = request.options.get("background")
    return open_image(request.reference, **({"background": background} if background else {}))


def _picture(student: Student, reference: Image | None, request: Request, **more: Any) -> Image:
    return student.generate(reference, request.prompt, seed=request.seed, **request.options, **more)


def _there(
    pending: Sequence[Pending], loading: dict[str, Any], report: Callable[..., None], engine: Engine
) -> Iterator[tuple[int, Image | UserError]]:
    """The same by the engine's workers, as they come. References and pictures travel; the weights must be there."""
    from diptych.recipe.schema import Recipe

    device = {"device": loading["device"]} if loading.get("device") else {}
    workers = engine.of(Recipe(name="generate", **device))
    drawn: list[int] = []

    def say(note: str) -> None:
        report(len(drawn), len(pending), note)

    for index, picture in workers.each("generate", _Drawer(loading), _Wishes(pending), say):
        drawn.append(index)
        yield index, picture


@dataclass(frozen=True)
class _Wishes(Sequence[Any]):
    """Requests with their references, opened when a worker asks for one."""

    pending: Sequence[Pending]

    def __len__(self) -> int:
        return len(self.pending)

    def __getitem__(self, index: Any) -> tuple[Image | None, Request]:
        request, _ = self.pending[index]
        return _reference(request), request


@dataclass(frozen=True)
class _Drawer:
    """Opens a student in a worker."""

    loading: dict[str, Any]

    def __call__(self) -> Callable[[tuple[Image | None, Request]], Image | UserError]:
        from diptych.apps.student import Student

        student = Student.load(**self.loading, progress_bar=False)

        def one(wish: tuple[Image | None, Request]) -> Image | UserError:
            try:
                return _picture(student, *wish)
            except UserError as error:
                return UserError(str(error))

        return one


def _keep(
    pending: Sequence[Pending],
    pictures: Iterator[tuple[int, Image | UserError]],
    outcome: Outcome,
    plan: Plan,
    report: Callable[..., None],
    writes: bool,
) -> None:
    """Saves each picture as it comes, and notes each failure; one picture alone fails as itself."""
    several = len(plan.requests) > 1
    for done, (index, picture) in enumerate(pictures):
        request, told = pending[index]
        if isinstance(picture, UserError):
            if not several:
                raise picture
            outcome.failed.append({**request.told(), "reason": str(picture)})
            if writes:
                _note_failed(plan, outcome)
            continue
        if writes:
            provenance = {**picture.info, **told}
            outcome.drawn.append((save_image(picture, request.out, provenance), provenance))
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
