"""The service behind the HTTP API and the web app: takes requests as jobs, hands them to the workers, gives results.

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
from diptych.serve.limits import Busy, Lanes, OverQuota, RateLimit
from diptych.serve.progress import ProgressBoard, ServerMetrics
from diptych.serve.request_models import JobRequest, RelightRequest, check
from diptych.serve.runs import Runs
from diptych.serve.worker import Worker
from diptych.utils import documents
from diptych.utils.io import sha256

if TYPE_CHECKING:
    from diptych.apps.student import Student

FILE = "jobs.sqlite"
WATCH = 1.0  # seconds between looks after the workers and the store
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")  # of references; Pillow knows some fifty more
log = logging.getLogger("diptych.serve")


class Service:
    """Jobs and those who draw them; see the module."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.clock = Clock(min(SETTLE, 3600 * settings.keep_hours))
        self.store = JobStore(settings.folder / FILE, self.clock)
        waiting, failed = self.store.recover()
        if waiting or failed:
            log.warning("%d pictures of an earlier start wait; %d jobs were given up", waiting, failed)
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
        self.left = 0  # pictures that waited when it stopped
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

    # ---- life

    def start(self) -> None:
        """Lets the workers load their models, and draw what a server before this one left."""
        for worker in self.workers:
            worker.work.set()
            worker.start()
        self._watch.start()

    def drain(self) -> None:
        """Takes no new jobs, and lets each worker end with the batch it has."""
        self.draining = True
        self._ended.set()
        for worker in self.workers:
            worker.stop()
        self.board.ring_all()

    def stop(self) -> None:
        """Ends the workers, within `grace_seconds` or by giving the batch in hand up, and closes the store."""
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
        """Starts workers that died again, tries a store that could not be written, and lets old results expire."""
        while not self._ended.wait(WATCH):
            try:
                for worker in self.workers:
                    if worker.died:
                        log.error("a worker died; it is started again")
                        worker.start()
                self.sweep()
                if self.store.disk.trouble() is not None:
                    self.store.probe()
            except Unwritable:
                pass  # `/readyz` says so, and the next look tries again
            except Exception:
                log.exception("the server could not look after its workers; it tries again")

    @property
    def ready(self) -> bool:
        """Whether jobs are taken, can be stored, and are drawn by every worker."""
        return self.unready() is None

    def unready(self) -> str | None:
        """Why the server is not ready, None if it is."""
        if self.draining:
            return "stopping"
        if (trouble := self.store.disk.trouble()) is not None:
            return str(trouble)
        for worker in self.workers:
            if worker.died:
                return "a worker died; it is started again"
            if worker.student is None:
                return "the model is being loaded"
            if not worker.ready:
                return worker.trouble or "a worker is being started"
        return None

    @property
    def failure(self) -> UserError | None:
        """Why a worker has no model."""
        return next((worker.failure for worker in self.workers if worker.failure is not None), None)

    @property
    def student(self) -> Student:
        """A loaded student, to be asked what it can do. Busy while there is none."""
        for worker in self.workers:
            if worker.student is not None:
                return worker.student
        raise Busy("the model is being loaded", 5, 503)

    # ---- asking

    def add_reference(self, owner: str, data: bytes, background: str = "white") -> str:
        """A reference's id. The picture is decoded once, here, within the limits, and kept as plain RGB."""
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
        """`add_reference` in a thread for images of its size. Busy if too many wait for that."""
        self._check_quota(owner)
        pixels = await self.lanes.small.run(owner, _pixels, data)
        return await self.lanes.of(pixels).run(owner, self.add_reference, owner, data, background)

    def _check_quota(self, owner: str, size: int = 0) -> None:
        """OverQuota if an owner cannot keep `size` bytes more."""
        most, kept = self.settings.limits.kept_bytes, self.store.kept(owner)
        if most and kept + size >= most:
            self.metrics.refused.labels("quota").inc()
            raise OverQuota(
                f"{documents.size(kept)} are kept for you, and at most {documents.size(most)} may be; "
                f"results and references expire after {self.settings.keep_hours:g} hours"
            )

    def limit(self, owner: str, stores: bool = True) -> None:
        """Counts a request that makes work against its key. Busy if that is over its rate, and for one that `stores`
        something Unwritable while that is not possible."""
        if seconds := self.rate.take(owner):
            self.metrics.refused.labels("rate").inc()
            raise Busy("this key asks too often", seconds)
        if stores and (trouble := self.store.disk.trouble()) is not None:
            raise trouble

    def submit(
        self, owner: str, asked: JobRequest, reference: str | None = None, mask: str | None = None
    ) -> dict[str, Any]:
        """The job of a request, new or, for a repeated `asked.job`, the one that is there. `reference` and `mask` (of
        what may change when relighting) are ids.

        UsageError for what cannot be drawn, Busy when it cannot be taken now.
        """
        student = self.student
        check(asked, self.settings.limits, student.pipeline.default_panel_size)
        remarks = asked.remarks()
        asked = asked.resolved(student.sampling, self.settings.limits)
        canvas = student.canvas(asked.pixels())
        if isinstance(asked, RelightRequest):
            self._check_relit(owner, asked, reference, mask, canvas)
        texts = asked.texts()
        request = {
            "kind": asked.kind,
            "prompt": asked.about(),
            "texts": texts,
            **asked.more(),
            "options": asked.options(),
            "speed": asked.speed,
            "reference": reference,
            "mask": mask,
            "warnings": [remarks + said for said in _warnings(student, asked, reference is not None)],
            "output_format": asked.output_format,
            "quality": asked.quality or "auto",
            "user": asked.safety_identifier or asked.user,
            "previews": asked.partial_images > 0 or not asked.wait,
            "cost": asked.cost(student.sampling, student.pipeline.default_panel_size),
            "asked": sha256(f"{asked.drawing()}{reference}{mask}"),
        }
        if asked.job is not None and (there := self.store.job(owner, asked.job)) is not None:
            return self._same(there, request)
        if self.draining:
            raise Busy("the server is stopping", 5, 503)
        self._check_quota(owner)
        with self._accepting:
            waiting = self.store.waiting(owner)
            if waiting + len(texts) > self.settings.limits.queue:
                self.metrics.refused.labels("queue").inc()
                seconds = self.seconds_for(min(self.store.waiting(), waiting * self.store.owners_waiting()))
                raise Busy(f"{waiting} pictures of yours wait already", seconds / 2)
            seed = asked.seed if asked.seed is not None else secrets.randbelow(2**31)
            id = asked.job or f"job_{secrets.token_urlsafe(18)}"
            pictures = [f"img_{secrets.token_urlsafe(18)}" for _ in texts]
            seeds = asked.seeds(seed)
            try:
                self.store.add(owner, id, request, asked.settings(reference is not None), seeds, pictures)
            except sqlite3.IntegrityError:
                there = self.store.job(owner, id)
                assert there is not None
                return self._same(there, request)
        for worker in self.workers:
            worker.work.set()
        job = self.store.job(owner, id)
        assert job is not None
        return job

    def _check_relit(
        self, owner: str, asked: RelightRequest, reference: str | None, mask: str | None, canvas: Any
    ) -> None:
        """UsageError for a picture or a mask that is missing or does not fit."""
        from PIL import Image

        from diptych.apps.relight import default_fit, kept

        pictures = [self.store.reference(owner, id) if id else None for id in (reference, mask)]
        if pictures[0] is None:
            raise UsageError("image: send the picture that is to be relit")
        if mask is not None:
            if pictures[1] is None:
                raise UsageError("mask: it is no longer there; send it again")
            with Image.open(io.BytesIO(pictures[0])) as seen, Image.open(io.BytesIO(pictures[1])) as of:
                lane = self.lanes.of(max(seen.width * seen.height, of.width * of.height))
                fit = asked.fit or default_fit(asked.pixels())
                lane.start(owner, kept, of, seen.size, canvas, fit).result()

    @staticmethod
    def _same(there: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        if there["request"]["asked"] != request["asked"]:
            raise UsageError(f"job: '{there['id']}' is the name of another request; choose a new one")
        return there

    def cancel(self, owner: str, id: str) -> bool:
        """Gives a job up. False if there is none that is open."""
        job = self.store.job(owner, id)
        if job is None or not self.store.cancel(owner, id):
            return False
        self.metrics.jobs.labels("cancelled").inc()
        self.board.end(job["number"])
        return True

    def seconds_for(self, pictures: int) -> float:
        """About how long that many pictures take, from the batches drawn so far."""
        batch = sum(worker.seconds for worker in self.workers) / len(self.workers)
        return batch * max(1, pictures / self.settings.batch) / len(self.workers)

    def sweep(self) -> None:
        """Forgets what is older than the server keeps, at most once a minute."""
        if time.monotonic() - self._swept > 60 and self.clock.settled():
            self._swept = time.monotonic()
            self.store.forget(self.clock.now() - 3600 * self.settings.keep_hours)

    # ---- answering

    def state(self, owner: str, id: str) -> dict[str, Any] | None:
        """A job as its owner may see it, with how far it is."""
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
        }
        if job["status"] == "queued":
            state["waiting_before"] = self.store.before(owner, job["number"])
        return state

    def is_open(self, job: dict[str, Any]) -> bool:
        """Whether a job still waits or runs."""
        return job["status"] in OPEN


def _pixels(data: bytes) -> int:
    """Of an image file, by its header; 0 if it has none that can be read."""
    try:
        width, height = open_header(data, "image", FORMATS).size
    except Exception:  # whoever decodes it says what is wrong with it
        return 0
    return width * height


def _warnings(student: Student, asked: JobRequest, referenced: bool) -> list[list[str]]:
    """What the log would say of each picture of a request, in order."""
    texts, options = asked.texts(), asked.options()
    prompts = dict(zip(texts, texts, strict=True))
    if isinstance(asked, RelightRequest):
        from diptych.apps.relight import prompt_of

        prompts = {text: prompt_of(text, asked.scene) for text in texts}
    names = ("size", "negative_prompt", "image_guidance", "text_guidance")
    given = {name: options[name] for name in names if name in options}
    found = {text: student.warnings(prompt, referenced=referenced, **given) for text, prompt in prompts.items()}
    return [found[text] for text in texts]


def warnings_of(job: Mapping[str, Any], picture: Mapping[str, Any] | None = None) -> list[str]:
    """The warnings about a picture of a job, or about all of them, each once."""
    each = job["request"].get("warnings", [])  # jobs that an older version took have none
    if picture is not None:
        return each[picture["place"]] if each else []
    return list(dict.fromkeys(line for lines in each for line in lines))
