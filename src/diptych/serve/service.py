"""The service behind the HTTP API and the web app: stores requests as jobs, runs the workers, returns results.

service = Service(settings)
service.start()
job = service.submit(owner, ImageRequest(prompt="a cat on the moon"), png)
…
service.stop()
"""

from __future__ import annotations

import io
import logging
import secrets
import sqlite3
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diptych.data.formats import open_header
from diptych.data.images import encode_png, open_image
from diptych.errors import UsageError, UserError
from diptych.serve.auth import AddressSigner
from diptych.serve.config import ServerSettings
from diptych.serve.database import SETTLE, Clock, Unwritable
from diptych.serve.job_store import OPEN, JobStore
from diptych.serve.limits import Busy, Lanes, RateLimit, Refused
from diptych.serve.progress import ProgressBoard, ServerMetrics
from diptych.serve.request_models import JobRequest, RelightRequest, check
from diptych.serve.runs import Runs
from diptych.serve.worker import Worker
from diptych.utils import documents
from diptych.utils.io import sha256

if TYPE_CHECKING:
    from diptych.apps.student import Student

FILE = "jobs.sqlite"
LOADING = "The model is loading."
WATCH = 1.0  # seconds between checks of the workers and the store
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")  # of references; Pillow reads about fifty more
log = logging.getLogger("diptych.serve")


class Service:
    """Jobs and workers; see the module."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.clock = Clock(min(SETTLE, 3600 * settings.keep_hours))
        self.store = JobStore(settings.folder / FILE, self.clock)
        waiting, failed = self.store.recover()
        if waiting or failed:
            log.warning("%d images of an earlier start are queued; %d jobs failed", waiting, failed)
        self.board = ProgressBoard()
        self.metrics = ServerMetrics(self.store.waiting)
        self.signer = AddressSigner(self.store.secret("addresses", secrets.token_bytes(32)))
        self.rate = RateLimit(settings.limits.rate)
        self.workers = [
            Worker(self._loader(device), self.store, self.board, self.metrics, settings.batch, settings.watermark)
            for device in settings.devices
        ]
        self.runs = Runs(settings.runs) if settings.runs is not None else None
        self.draining = False
        self.left = 0  # images that were queued when it stopped
        self.lanes = Lanes()
        self._watch = threading.Thread(target=self._look_after, name="diptych-watch", daemon=True)
        self._ended = threading.Event()
        self._accepting = threading.Lock()
        self._swept = 0.0

    def _loader(self, device: str | None) -> Any:
        def load() -> Student:
            from diptych.apps.student import Student

            return Student.load(**self.settings.loading, device=device, progress_bar=False)

        return load

    # ---- start and stop

    def start(self) -> None:
        """Starts the workers, which load their models and continue the jobs of an earlier server."""
        for worker in self.workers:
            worker.work.set()
            worker.start()
        self._watch.start()

    def drain(self) -> None:
        """Accepts no new jobs, and stops each worker after its running batch."""
        self.draining = True
        self._ended.set()
        for worker in self.workers:
            worker.stop()
        self.board.wake_all()

    def stop(self) -> None:
        """Stops the workers and closes the store. A batch that takes longer than `grace_seconds` is abandoned."""
        self.drain()
        until = time.monotonic() + self.settings.grace_seconds
        for worker in self.workers:
            worker.join(max(0.0, until - time.monotonic()))
            if worker.is_alive():
                worker.abandon()
                worker.join(self.settings.grace_seconds)
        self.lanes.close()
        if not any(worker.is_alive() for worker in self.workers):
            self.left = self.store.waiting()
            self.store.close()

    def _look_after(self) -> None:
        """Restarts dead workers, tries a store that could not be written again, and deletes expired results."""
        while not self._ended.wait(WATCH):
            try:
                for worker in self.workers:
                    if worker.died:
                        log.error("A worker died. It is restarted.")
                        worker.start()
                self.sweep()
                if self.store.disk.trouble() is not None:
                    self.store.probe()
            except Unwritable:
                pass  # `/readyz` reports it, and the next check tries again
            except Exception:
                log.exception("The check of the workers failed. It is tried again.")

    @property
    def ready(self) -> bool:
        """Whether jobs are accepted, can be stored, and run on every worker."""
        return self.unready() is None

    def unready(self) -> str | None:
        """Returns why the server is not ready, None if it is."""
        if self.draining:
            return "The server is stopping."
        if (trouble := self.store.disk.trouble()) is not None:
            return str(trouble)
        for worker in self.workers:
            if worker.died:
                return "A worker died. It is restarted."
            if worker.student is None:
                return LOADING
            if not worker.ready:
                return worker.trouble or "A worker is starting."
        return None

    @property
    def failure(self) -> UserError | None:
        """Error of a worker that could not load the model."""
        return next((worker.failure for worker in self.workers if worker.failure is not None), None)

    @property
    def student(self) -> Student:
        """A loaded student, for information about the model. Raises Busy while it loads."""
        for worker in self.workers:
            if worker.student is not None:
                return worker.student
        raise Busy(LOADING, 5, 503)

    # ---- requests

    def add_reference(self, owner: str, data: bytes, background: str = "white") -> str:
        """Stores a reference and returns its id. The image is decoded once, within the limits, and stored as RGB."""
        limits = self.settings.limits
        image = open_image(
            data,
            max_bytes=limits.upload_bytes,
            max_pixels=limits.upload_pixels,
            name="image",
            background=background,
            formats=FORMATS,
        )
        png = encode_png(image)
        self._check_quota(owner, len(png))
        id = "ref_" + sha256(f"{owner}\0".encode() + png)[:40]
        self.store.put_reference(owner, id, png, image.size)
        return id

    async def keep_reference(self, owner: str, data: bytes, background: str = "white") -> str:
        """Runs `add_reference` in the lane for images of this size. Busy if that lane is full."""
        self._check_quota(owner)
        pixels = await self.lanes.small.run(owner, _pixels, data)
        return await self.lanes.of(pixels).run(owner, self.add_reference, owner, data, background)

    def _check_quota(self, owner: str, size: int = 0) -> None:
        """Raises Refused if an owner cannot store `size` bytes more."""
        limit, kept = self.settings.limits.kept_bytes, self.store.kept(owner)
        if limit and kept + size >= limit:
            self.metrics.refused.labels("quota").inc()
            sizes = f"{documents.size(kept)} of {documents.size(limit)} are stored for you"
            expiry = f"Results and references expire after {self.settings.keep_hours:g} hours."
            raise Refused("quota_exceeded", f"Quota exhausted: {sizes}. {expiry}", 413)

    def limit(self, owner: str, stores: bool = True) -> None:
        """Counts a request against its key's rate. Raises Busy over the limit, and, for a request that `stores` data,
        Unwritable while the store cannot be written."""
        if seconds := self.rate.take(owner):
            self.metrics.refused.labels("rate").inc()
            raise Busy(f"Rate limit exceeded. Retry in {max(1, round(seconds + 0.5))} s.", seconds, code="rate_limited")
        if stores and (trouble := self.store.disk.trouble()) is not None:
            raise trouble

    def submit(
        self, owner: str, parsed: JobRequest, reference: str | None = None, mask: str | None = None
    ) -> dict[str, Any]:
        """Makes the job of a request, or returns the existing one for a repeated `parsed.job`.

        `reference` and `mask` (for relighting) are ids of stored images.
        UsageError for a request that cannot run, Busy if it cannot be accepted now.
        """
        student = self.student
        check(parsed, self.settings.limits, student.pipeline.default_panel_size)
        remarks = parsed.remarks()
        parsed = parsed.resolved(student.sampling, self.settings.limits)
        canvas = student.canvas(parsed.pixels())
        if isinstance(parsed, RelightRequest):
            self._check_relight(owner, parsed, reference, mask, canvas)
        texts = parsed.texts()
        request = {
            "kind": parsed.kind,
            "prompt": parsed.about(),
            "texts": texts,
            **parsed.more(),
            "options": parsed.options(),
            "speed": parsed.speed,
            "reference": reference,
            "mask": mask,
            "warnings": [remarks + lines for lines in _warnings(student, parsed, reference is not None)],
            "output_format": parsed.output_format,
            "quality": parsed.quality or "auto",
            "user": parsed.safety_identifier or parsed.user,
            "previews": parsed.partial_images > 0 or not parsed.wait,
            "cost": parsed.cost(student.sampling, student.pipeline.default_panel_size),
            "asked": sha256(f"{parsed.identity()}{reference}{mask}"),
        }
        if parsed.job is not None and (known := self.store.job(owner, parsed.job)) is not None:
            return self._same(known, request)
        if self.draining:
            raise Busy("The server is stopping.", 5, 503)
        self._check_quota(owner)
        with self._accepting:
            waiting = self.store.waiting(owner)
            if waiting + len(texts) > self.settings.limits.queue:
                self.metrics.refused.labels("queue").inc()
                seconds = self.seconds_for(min(self.store.waiting(), waiting * self.store.owners_waiting()))
                raise Busy(f"Queue full: {waiting} of {self.settings.limits.queue} images are queued.", seconds / 2)
            seed = parsed.seed if parsed.seed is not None else secrets.randbelow(2**31)
            id = parsed.job or f"job_{secrets.token_urlsafe(18)}"
            pictures = [f"img_{secrets.token_urlsafe(18)}" for _ in texts]
            seeds = parsed.seeds(seed)
            try:
                self.store.add(owner, id, request, parsed.settings(reference is not None), seeds, pictures)
            except sqlite3.IntegrityError:
                known = self.store.job(owner, id)
                assert known is not None
                return self._same(known, request)
        for worker in self.workers:
            worker.work.set()
        job = self.store.job(owner, id)
        assert job is not None
        return job

    def _check_relight(
        self, owner: str, parsed: RelightRequest, reference: str | None, mask: str | None, canvas: Any
    ) -> None:
        """Raises UsageError for an image or a mask that is missing or does not fit."""
        from PIL import Image

        from diptych.apps.relight import default_fit, kept

        pngs = [self.store.reference(owner, id) if id else None for id in (reference, mask)]
        if pngs[0] is None:
            raise UsageError("image_missing", "image: send the image to relight")
        if mask is not None:
            if pngs[1] is None:
                raise UsageError("job_not_found", "mask: it has expired; send it again")
            with Image.open(io.BytesIO(pngs[0])) as image, Image.open(io.BytesIO(pngs[1])) as opened:
                lane = self.lanes.of(max(image.width * image.height, opened.width * opened.height))
                fit = parsed.fit or default_fit(parsed.pixels())
                lane.start(owner, kept, opened, image.size, canvas, fit).result()

    @staticmethod
    def _same(known: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        if known["request"]["asked"] != request["asked"]:
            raise UsageError("request_invalid", f"job: '{known['id']}' is another request's name; choose a new one")
        return known

    def cancel(self, owner: str, id: str) -> bool:
        """Cancels a job. Returns False if it is unknown or has ended."""
        job = self.store.job(owner, id)
        if job is None or not self.store.cancel(owner, id):
            return False
        self.metrics.jobs.labels("cancelled").inc()
        self.board.end(job["number"])
        return True

    def seconds_for(self, pictures: int) -> float:
        """Estimates the seconds for this many images, from the batches so far."""
        batch = sum(worker.seconds for worker in self.workers) / len(self.workers)
        return batch * max(1, pictures / self.settings.batch) / len(self.workers)

    def sweep(self) -> None:
        """Deletes expired jobs and references, at most once a minute."""
        if time.monotonic() - self._swept > 60 and self.clock.settled():
            self._swept = time.monotonic()
            self.store.forget(self.clock.now() - 3600 * self.settings.keep_hours)

    # ---- responses

    def state(self, owner: str, id: str) -> dict[str, Any] | None:
        """Returns the state of an owner's job, with its progress."""
        job = self.store.job(owner, id)
        if job is None:
            return None
        live = self.board.live(job["number"])
        done = sum(picture["status"] == "done" for picture in job["pictures"])
        state: dict[str, Any] = {
            "id": job["id"],
            "object": "job",
            "kind": job["request"]["kind"],
            "status": job["status"],
            "created": int(job["created"]),
            "finished": int(job["finished"]) if job["finished"] else None,
            "prompt": job["request"]["prompt"],
            "pictures": [
                {
                    "id": p["id"],
                    "text": text,
                    "seed": p["seed"],
                    "status": p["status"],
                    "settings": p["made_by"] or None,
                    "warnings": warnings_of(job, p),
                }
                for p, text in zip(job["pictures"], job["request"]["texts"], strict=True)
            ],
            "warnings": warnings_of(job),
            "progress": {"done": done, "of": len(job["pictures"]), "step": live.step, "steps": live.steps},
            "error": job["error"] or None,
            "code": job["request"].get("code"),
        }
        if job["status"] == "queued":
            state["waiting_before"] = self.store.before(owner, job["number"])
        return state

    def is_open(self, job: dict[str, Any]) -> bool:
        """Whether a job is queued or running."""
        return job["status"] in OPEN


def _pixels(data: bytes) -> int:
    """Pixels of an image file, from its header; 0 if that cannot be read."""
    try:
        width, height = open_header(data, "image", FORMATS).size
    except Exception:  # decoding it reports the error
        return 0
    return width * height


def _warnings(student: Student, parsed: JobRequest, referenced: bool) -> list[list[str]]:
    """The warnings that `Student.generate` would log for each image of a request, in order."""
    texts, options = parsed.texts(), parsed.options()
    prompts = dict(zip(texts, texts, strict=True))
    if isinstance(parsed, RelightRequest):
        from diptych.apps.relight import prompt_of

        prompts = {text: prompt_of(text, parsed.scene) for text in texts}
    names = ("size", "negative_prompt", "image_guidance", "text_guidance")
    given = {name: options[name] for name in names if name in options}
    lines = {text: student.warnings(prompt, referenced=referenced, **given) for text, prompt in prompts.items()}
    return [lines[text] for text in texts]


def warnings_of(job: Mapping[str, Any], picture: Mapping[str, Any] | None = None) -> list[str]:
    """Returns the warnings about an image of a job, or about all of them, each once."""
    each = job["request"].get("warnings", [])  # jobs of an older version have none
    if picture is not None:
        return each[picture["place"]] if each else []
    return list(dict.fromkeys(line for lines in each for line in lines))
