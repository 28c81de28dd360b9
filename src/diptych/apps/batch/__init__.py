"""Generates many images with one command: which images, their file names, what exists already, and what failed.

The input is rows, and each image of a row has its own file (`requests`). Every file stores a digest of its request:
weights, reference, prompt, seed, options. So the same command, interrupted or run again, generates only what is missing
or has changed. A request that fails is noted in `failed.jsonl`, and the others continue.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.apps.batch.requests import BatchPlan, Request, check_row, multiply, name_all, read_rows
from diptych.data.engine import Engine, LocalEngine
from diptych.data.images import check_image, open_image, read_provenance, save_image
from diptych.errors import UsageError, UserError
from diptych.utils.io import check_writable, sha256_json, write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.apps.student import Student
    from diptych.utils.console import Display

FAILED = "failed.jsonl"
Pending = tuple[Request, dict[str, Any]]  # a request, and the provenance its file gets beside the student's


@dataclass
class BatchResult:
    """Result of a plan: file and provenance of each new image, the files left as they were, and the rows that
    `failed.jsonl` lists."""

    generated: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)


def plan(defaults: dict[str, Any], jobs: str | Path | None, out: str | Path | None) -> BatchPlan:
    """Plans the requests of one row (`defaults`), or of a JSONL file whose rows take missing keys from `defaults`.

    `out` is a file for one image, else a folder or a pattern with `requests.FIELDS` in braces. Reads only the JSONL
    file and the names in folders. UsageError for values that no model accepts.
    """
    common = {key: value for key, value in defaults.items() if value is not None}
    if jobs is None:
        check_row(common, "")
        requests = list(multiply(common, 1, Path()))
    else:
        requests = []
        for line, row in read_rows(Path(jobs)):
            check_row(common | row, f"{jobs}:{line}: ")
            # References in the file are relative to the file; the command's are relative to the working folder.
            here = Path(jobs).parent if "reference" in row else Path()
            requests += multiply(common | row, line, here, f"{jobs}:{line}: ")
        if not requests:
            raise UsageError(
                "row_invalid", f"{jobs} has no rows. Write one JSON object per line, with reference and prompt."
            )
    return name_all(requests, out, alone=jobs is None)


# Which files are up to date ------------------------------------------------------------------------------------------


def identify(loading: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `Student.load` with a digest in place of each path to weights.

    The device is left out, so another machine does not generate an image again.
    """
    from diptych.student.runtime import speed as speeds
    from diptych.utils.models import BUILT_IN, with_scale

    identity = {key: value for key, value in loading.items() if value not in (None, [], ()) and key != "device"}
    if identity.get("model") in BUILT_IN:
        identity.setdefault("base", identity["model"])
    quick = speeds.parse(identity.get("speed"), identity.get("switches", ()))
    if quick.few_step_lora:
        identity["switches"] = [s for s in identity["switches"] if speeds.name_of(s) != "few_step_lora"]
        identity["few_step_lora"] = _weights(with_scale(quick.few_step_lora), None)
    roles = {"model": "student", "base": "teacher", "lora": None}
    return {key: _weights(value, roles[key]) if key in roles else value for key, value in identity.items()}


def _weights(value: Any, role: str | None) -> Any:
    """A digest of a model or LoRA. Above 2 GiB it covers names, sizes and times, since hashing takes minutes."""
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
    return sha256_json([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats], sort_keys=False)


def request_digest(request: Request, weights: dict[str, Any], reference: str | None) -> str:
    """Returns the sha256 of a whole request; `reference` is the sha256 of its file."""
    row = {"prompt": request.prompt, "seed": request.seed, **request.options}
    return sha256_json({"weights": weights, "reference": reference, **row}, default=str)


def _is_current(request: Request, digest: str) -> bool:
    """Whether the file is the image of this request. UsageError for a file that no request made."""
    if not request.out.exists():
        return False
    try:
        made = read_provenance(request.out)
    except UserError:
        made = None
    if made is None or "request" not in made:
        raise UsageError("output_exists", f"{request.out}: not made by this command. Choose another --out.")
    return made["request"] == digest


# Generating ----------------------------------------------------------------------------------------------------------


def generate(
    plan: BatchPlan,
    loading: dict[str, Any],
    load: Callable[[], Student],
    display: Display,
    *,
    writes: bool = True,
    preview: Path | None = None,
    engine: Engine | None = None,
) -> BatchResult:
    """Generates the images of a plan that are missing or out of date.

    References are checked before the model is loaded, and the model is loaded only if there is something to generate.
    A single request raises its error; among several, an error fails that request only and is noted in `failed.jsonl`.

    Args:
        loading: the arguments of `Student.load` that `load` uses; see `identify`.
        load: opens the student.
        writes: False in processes that share the work of another one, which writes.
        preview: an image file that is rewritten while an image is being generated.
        engine: a cluster's engine, whose workers open the student by `loading` and generate. By default this process
            does.

    Raises:
        UsageError for a file that would overwrite a reference or a file of others, UserError of a single request.
    """
    result, requests = BatchResult(), plan.requests
    checked = _check_references(requests, result)
    references = {r.reference.resolve() for r in requests if r.reference is not None}
    for path in [r.out for r in requests] + ([preview] if preview else []):
        if path.resolve() in references:
            raise UsageError("output_collision", f"{path} is one of the references. Choose another file to write.")
    weights = identify(loading) if checked else {}
    pending: list[Pending] = []
    for request, reference in checked:
        digest = request_digest(request, weights, reference)
        if plan.folder is not None and _is_current(request, digest):
            result.skipped.append(request.out)
            continue
        provenance: dict[str, Any] = {}
        if request.reference:
            provenance |= {"reference_file": request.reference.name, "reference_sha256": reference}
        if request.original_prompt:
            provenance["asked_prompt"] = request.original_prompt
        pending.append((request, {**provenance, "request": digest}))
    if writes:
        for folder in {request.out.parent for request, _ in pending}:
            check_writable(folder)  # before minutes of loading and generating
        _note_failed(plan, result)
    if pending:
        several = len(requests) > 1
        cluster = None if engine is None or isinstance(engine, LocalEngine) else engine
        student = load() if cluster is None else None
        with display.stage("generating", "images" if several else "steps") as report:
            if cluster is not None:
                images = _on_cluster(pending, loading, report, cluster)
            else:
                assert student is not None
                images = _locally(pending, student, report, several, preview if writes else None)
            _save(pending, images, result, plan, report, writes)
    return result


def _check_references(requests: Sequence[Request], result: BatchResult) -> list[tuple[Request, str | None]]:
    """(request, sha256 of its reference). Requests whose reference cannot be used go to `result.failed`."""
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
        digest = seen[path]
        if isinstance(digest, str):
            fine.append((request, digest))
        elif len(requests) == 1:
            raise digest
        else:
            result.failed.append({**request.as_row(), "reason": str(digest)})
    return fine


def _locally(
    pending: Sequence[Pending],
    student: Student,
    report: Callable[..., None],
    several: bool,
    preview: Path | None,
) -> Iterator[tuple[int, Image | UserError]]:
    """Yields (index, image or error) of each request in order, generated in this process."""
    opened: tuple[Any, Image | None] = (None, None)  # the last reference, so that the pipeline recognizes it again
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
            image = _generate(student, opened[1], request, **options)
        except UserError as error:
            image = error
        yield done, image


def _reference(request: Request) -> Image | None:
    if request.reference is None:
        return None
    background = request.options.get("background")
    return open_image(request.reference, **({"background": background} if background else {}))


def _generate(student: Student, reference: Image | None, request: Request, **more: Any) -> Image:
    return student.generate(reference, request.prompt, seed=request.seed, **request.options, **more)


def _on_cluster(
    pending: Sequence[Pending], loading: dict[str, Any], report: Callable[..., None], engine: Engine
) -> Iterator[tuple[int, Image | UserError]]:
    """Yields (index, image or error) as the engine's workers finish. Workers need the weights, not the references."""
    from diptych.recipe.schema import Recipe

    device = {"device": loading["device"]} if loading.get("device") else {}
    workers = engine.of(Recipe(name="generate", **device))
    done = 0

    def note(text: str) -> None:
        report(done, len(pending), text)

    for index, image in workers.each("generate", _OpenStudent(loading), _Opened(pending), note):
        done += 1
        yield index, image


@dataclass(frozen=True)
class _Opened(Sequence[Any]):
    """Requests with their references, each opened when a worker takes it."""

    pending: Sequence[Pending]

    def __len__(self) -> int:
        return len(self.pending)

    def __getitem__(self, index: Any) -> tuple[Image | None, Request]:
        request, _ = self.pending[index]
        return _reference(request), request


@dataclass(frozen=True)
class _OpenStudent:
    """Opens a student in a worker, and returns a function that generates the image of a request."""

    loading: dict[str, Any]

    def __call__(self) -> Callable[[tuple[Image | None, Request]], Image | UserError]:
        from diptych.apps.student import Student

        student = Student.load(**self.loading, progress_bar=False)

        def generate(item: tuple[Image | None, Request]) -> Image | UserError:
            try:
                return _generate(student, *item)
            except UserError as error:
                return UserError(error.code, str(error))

        return generate


def _save(
    pending: Sequence[Pending],
    images: Iterator[tuple[int, Image | UserError]],
    result: BatchResult,
    plan: BatchPlan,
    report: Callable[..., None],
    writes: bool,
) -> None:
    """Saves each image as it comes and notes each failure. Raises the error of a single request."""
    several = len(plan.requests) > 1
    for done, (index, image) in enumerate(images):
        request, provenance = pending[index]
        if isinstance(image, UserError):
            if not several:
                raise image
            result.failed.append({**request.as_row(), "reason": str(image)})
            if writes:
                _note_failed(plan, result)
            continue
        if writes:
            provenance = {**image.info, **provenance}
            result.generated.append((save_image(image, request.out, provenance), provenance))
        if several:
            report(done + 1, len(pending))


def _note_failed(plan: BatchPlan, result: BatchResult) -> None:
    """Writes the failures of this call to `failed.jsonl`; removes that file if there are none."""
    if plan.folder is None:
        return
    path = plan.folder / FAILED
    if not result.failed:
        path.unlink(missing_ok=True)
        return
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.failed).encode())


def format_counts(result: BatchResult) -> str:
    """Returns the counts in words: `3 generated, 2 unchanged, 1 failed`."""
    counts = {"generated": len(result.generated), "unchanged": len(result.skipped), "failed": len(result.failed)}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count or word == "generated")
