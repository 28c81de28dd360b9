"""A worker: one student on one device, and a thread that generates the queued images of the store.

A batch has equal settings; each image has its reference, prompt and seed. `Student.generate` uses the noise of each
seed, so an image equals that of `diptych generate`. A batch that fails is tried again one by one, so one bad request
fails one job. After an error outside of generating, such as a full disk, the worker tries again, and `trouble` gives
the reason. A new thread resumes the batch of one that died.

`mark` adds an invisible watermark of one bit, for images that lost the provenance in their files: a pattern of
±STRENGTH on all channels of each pixel, its signs from a generator seeded with the key and the size. `score` subtracts
the 3×3 mean of an image and correlates the rest with that pattern. The score is about standard normal for an image
without the watermark or with another key, and grows with the number of pixels for one with it. The watermark survives
PNG, WebP, mild JPEG and noise. It does not survive scaling, cropping, rotation, or deliberate removal.
"""

from __future__ import annotations

import hashlib
import io
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from diptych.data.images import encode, encode_png
from diptych.errors import UserError, describe
from diptych.provenance.sign import source_type
from diptych.serve.database import Unwritable
from diptych.serve.job_store import JobStore, QueuedImage
from diptych.serve.progress import ProgressBoard, ServerMetrics

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.apps.student import Student

log = logging.getLogger("diptych.serve")
KINDS = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}
LINGER = 0.005  # seconds that an image waits for others of its batch
PREVIEWS = 8  # maximum per image
THREAD = "diptych-worker"  # name of the thread
RETRY = 1.0  # seconds until a worker tries again
Result = TypeVar("Result")


class Worker:
    """A worker; see the module.

    `load` opens the student. `failure` is the error if that failed; `trouble` is why nothing is generated right now.
    """

    def __init__(
        self,
        load: Callable[[], Student],
        store: JobStore,
        board: ProgressBoard,
        metrics: ServerMetrics,
        batch: int,
        watermark: str | None,
    ) -> None:
        self.load, self.store, self.board, self.metrics = load, store, board, metrics
        self.batch, self.watermark = batch, watermark
        self.student: Student | None = None
        self.failure: UserError | None = None
        self.trouble: str | None = None
        self.seconds = 5.0  # per batch, a running mean; a guess before the first batch
        self.work = threading.Event()  # set when images may be queued
        self._thread: threading.Thread | None = None
        self._taken: list[str] = []  # images taken from the store
        self._halt = threading.Event()
        self._abandon = threading.Event()

    def start(self) -> None:
        """Starts the thread, or a new one after a thread died."""
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the thread to end."""
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def died(self) -> bool:
        """Whether the thread has ended and should not have."""
        ended = self._thread is not None and not self._thread.is_alive()
        return ended and self.failure is None and not self._halt.is_set()

    @property
    def ready(self) -> bool:
        return self.student is not None and self.trouble is None and self.is_alive()

    def stop(self) -> None:
        """Stops the thread after the running batch."""
        self._halt.set()
        self.work.set()

    def abandon(self) -> None:
        """Stops the thread at the next step. The images of its batch are queued for the next start."""
        self._abandon.set()
        self.stop()

    def _run(self) -> None:
        try:
            if self.student is None:
                self.student = self.load()
                self._default_speed = self._speed = self.student.pipeline.runtime.speed
        except UserError as error:
            self.failure = error
            return
        except Exception as error:
            log.exception("The model could not be loaded.")
            self.failure = UserError("internal", f"The model could not be loaded ({describe(error, kind=True)}).")
            return
        while not self._halt.is_set():
            try:
                self._turn()
            except Unwritable as error:
                self._wait(str(error))
            except Exception as error:
                log.exception("A worker was interrupted. It tries again.")
                self._wait(f"A worker was interrupted by an error ({type(error).__name__}).")

    def _wait(self, trouble: str) -> bool:
        """Waits before the next try; True if the worker is to stop instead."""
        if self.trouble != trouble:
            log.error("Nothing is generated: %s", trouble)
        self.trouble = trouble
        return self._halt.wait(RETRY)

    def _turn(self) -> None:
        """Generates the queued images until there are none."""
        if self._taken:
            self.store.recover(self._taken)
            self._taken = []
        self.work.wait(1.0)
        self.work.clear()
        if self.batch > 1 and self.store.waiting() < self.batch:
            time.sleep(LINGER)
        while not self._halt.is_set():
            tasks = self.store.take(self.batch)
            self.trouble = None
            if not tasks:
                return
            self._taken = [task.picture for task in tasks]
            # Relighting runs one by one, since each image has its mask and detail.
            for batch in [tasks] if tasks[0].request["kind"] != "relight" else [[task] for task in tasks]:
                self._run_batch(batch)
            self._taken = []

    def _stored(self, write: Callable[[], Result]) -> Result:
        """Returns the result of `write`, retried until the store is writable, so that nothing is generated twice."""
        while True:
            try:
                written = write()
            except Unwritable as error:
                if self._wait(str(error)):
                    raise
            else:
                self.trouble = None
                return written

    def _run_batch(self, tasks: Sequence[QueuedImage]) -> None:
        started = time.monotonic()
        try:
            images = self._generate(tasks)
        except _Stopped:
            self._stored(lambda: self.store.requeue([task.picture for task in tasks]))
            return
        except UserError as error:
            if len(tasks) > 1:
                for task in tasks:
                    self._run_batch([task])
                return
            self._fail(tasks[0], describe(error, limit=None), error.code)
            return
        except Exception:
            log.exception("A batch of %d failed.", len(tasks))
            for task in tasks:
                self._fail(task, "Internal error. The server's log has the details.", "internal")
            return
        seconds = time.monotonic() - started
        self.seconds += (seconds - self.seconds) / 4
        self.metrics.draw.observe(seconds)
        self.metrics.batch.observe(len(tasks))
        for task, image in zip(tasks, images, strict=True):
            self._save(task, image)

    def _generate(self, tasks: Sequence[QueuedImage]) -> list[Image]:
        from PIL import Image

        assert self.student is not None
        self._use_speed(tasks[0].request.get("speed"))
        opened: dict[bytes, Any] = {}  # one object per image, so that the pipeline recognizes a repeated one
        for task in tasks:
            for name, png in (("reference", task.reference), ("mask", task.mask)):
                if png is not None and png not in opened:
                    opened[png] = Image.open(io.BytesIO(png)).convert("RGB")
                elif png is None and task.request[name] is not None:
                    raise UserError("job_not_found", f"The {name} has expired. Send it again.")
        pictures = [task.picture for task in tasks]

        def on_step(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            for job in {task.job for task in tasks}:
                self.board.report(job, step + 1, pipe.num_timesteps)
            if self._abandon.is_set() or len(self.store.cancelled(pictures)) == len(pictures):
                raise _Stopped
            return {}

        def on_preview(done: int, steps: int, images: list[Image.Image]) -> None:
            for task, image in zip(tasks, images, strict=True):
                self.board.report(task.job, done, steps, {task.place: encode_png(image)})

        options = dict(tasks[0].request["options"])
        steps = options.get("steps") or int(self.student.sampling["steps"])
        if any(task.request.get("previews") for task in tasks):
            options |= {"on_preview": on_preview, "preview_every": max(1, steps // PREVIEWS)}
        options["callback_on_step_end"] = on_step
        if tasks[0].request["kind"] == "relight":
            (task,) = tasks
            assert task.reference is not None
            mask = opened[task.mask] if task.mask is not None else None
            options |= {"mask": mask, "scene": task.request["scene"], "detail": task.request["detail"]}
            return [self.student.relight(opened[task.reference], task.text, seed=task.seed, **options)]
        return self.student.generate(
            [opened.get(task.reference) if task.reference is not None else None for task in tasks],
            [task.text for task in tasks],
            seed=[task.seed for task in tasks],
            pairwise=True,
            batch_size=len(tasks),
            **options,
        )

    def _use_speed(self, name: str | None) -> None:
        """Sets the speed preset of a request, or the server's."""
        from diptych.student.runtime import speed as speeds
        from diptych.student.runtime.applied import apply_speed

        assert self.student is not None
        wanted = self._default_speed if name is None else speeds.parse(None if name == "plain" else name)
        if wanted != self._speed:
            apply_speed(self.student.pipeline, wanted)
            self._speed = wanted

    def _save(self, task: QueuedImage, image: Image) -> None:
        made_by = {**image.info, "job": task.job_id, "digital_source_type": source_type(image.info)}
        if self.watermark is not None:
            image = mark(image, self.watermark)
            made_by["watermark"] = True
        kind = KINDS[task.request["output_format"]]
        try:
            data = encode(image, kind, made_by)
        except UserError as error:
            self._fail(task, str(error), error.code)
            return
        if self._stored(lambda: self.store.finish(task.picture, kind, data, made_by)):
            self.metrics.pictures.inc()
        job = self.store.job(task.owner, task.job_id)
        if job is not None and job["status"] == "done":
            self.metrics.jobs.labels("done").inc()
            self.board.end(task.job)
        else:
            self.board.report(task.job)

    def _fail(self, task: QueuedImage, reason: str, code: str) -> None:
        self._stored(lambda: self.store.fail(task.job, reason, code))
        self.metrics.jobs.labels("failed").inc()
        self.board.end(task.job)


class _Stopped(Exception):
    """The running batch was cancelled, or the server must stop."""


STRENGTH = 3  # of 255
CERTAIN = 5.0  # a score above it occurs by chance in less than one of a million images


def mark(image: Image, key: str) -> Image:
    """Returns an RGB image with the watermark of `key`."""
    from PIL import Image

    pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
    marked = pixels + STRENGTH * _signs(key, pixels.shape[:2])[..., None]
    return Image.fromarray(marked.clip(0, 255).astype(np.uint8))


def score(image: Image, key: str) -> float:
    """Returns the evidence for the watermark of `key` in an image, in standard deviations."""
    gray = np.asarray(image.convert("RGB"), dtype=np.float64).mean(axis=2)
    residual, signs = _detail(gray), _detail(_signs(key, gray.shape).astype(np.float64))
    norm = float(np.sqrt((residual**2).sum() * (signs**2).mean()))
    return float((residual * signs).sum() / norm) if norm else 0.0


def _signs(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """(h, w) of -1 and 1."""
    height, width = shape
    digest = hashlib.sha256(f"diptych watermark 1\0{key}\0{width}x{height}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
    return rng.integers(0, 2, (height, width), dtype=np.int16) * 2 - 1


def _detail(values: np.ndarray) -> np.ndarray:
    """(h, w) minus the mean of each 3×3 neighborhood."""
    around = np.pad(values, 1, mode="edge")
    height, width = values.shape
    mean = sum(around[i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9
    return values - mean
