"""A worker: one student on one device and a thread that draws what the store has waiting.

What it takes together has equal settings, and each picture its own reference, prompt and seed; `Student.generate` gives
every one the noise of its seed, so a picture is the one `diptych generate` draws. A batch that fails is tried again one
by one, so that one bad request costs one job. An error outside of drawing, such as a full disk, ends nothing: the
worker tries again, and `trouble` says why it does not draw. What a thread had in hand when it died is taken up by the
next one.

`mark` adds the invisible watermark, one bit that says "drawn here", for pictures that lost the text inside their files:
a pattern of ±STRENGTH on all channels of each pixel, its signs drawn by a generator seeded with the key and the size.
`score` correlates what is left of a picture after its 3×3 mean is taken away with that pattern: about a standard normal
number for a picture without the mark or of another key, and growing with the number of pixels for one with it. It
survives PNG, WebP, mild JPEG and noise; not scaling, cropping or turning, and no determined remover.
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
LINGER = 0.005  # seconds that a picture waits for others to be drawn with
PREVIEWS = 8  # at most, of one picture
THREAD = "diptych-worker"  # its thread's name
RETRY = 1.0  # seconds until a worker tries again
Result = TypeVar("Result")


class Worker:
    """`load` opens the student; `ready` says that it draws, `failure` why the student could not be opened, `trouble`
    why nothing is drawn for the moment."""

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
        self.seconds = 5.0  # of a batch, a running mean; a guess until one was drawn
        self.work = threading.Event()  # set when there may be something to draw
        self._thread: threading.Thread | None = None
        self._hand: list[str] = []  # pictures that were taken from the store
        self._halt = threading.Event()
        self._abandon = threading.Event()

    def start(self) -> None:
        """Starts the thread, or another one where the first has died."""
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
        """Takes nothing more; the batch in hand is drawn to its end."""
        self._halt.set()
        self.work.set()

    def abandon(self) -> None:
        """Gives the batch in hand up, too: its pictures wait for the next start."""
        self._abandon.set()
        self.stop()

    def _run(self) -> None:
        try:
            if self.student is None:
                self.student = self.load()
                self._own_speed = self._speed = self.student.pipeline.runtime.speed
        except UserError as error:
            self.failure = error
            return
        except Exception as error:
            log.exception("the model could not be loaded")
            self.failure = UserError(f"the model could not be loaded ({describe(error, kind=True)})")
            return
        while not self._halt.is_set():
            try:
                self._turn()
            except Unwritable as error:
                self._wait(str(error))
            except Exception as error:
                log.exception("a worker was interrupted; it tries again")
                self._wait(f"a worker was interrupted by an error ({type(error).__name__})")

    def _wait(self, trouble: str) -> bool:
        """Waits before the next try; True if the worker is to stop instead."""
        if self.trouble != trouble:
            log.error("nothing is drawn: %s", trouble)
        self.trouble = trouble
        return self._halt.wait(RETRY)

    def _turn(self) -> None:
        """Draws what waits, until there is no more."""
        if self._hand:
            self.store.recover(self._hand)
            self._hand = []
        self.work.wait(1.0)
        self.work.clear()
        if self.batch > 1 and self.store.waiting() < self.batch:
            time.sleep(LINGER)
        while not self._halt.is_set():
            tasks = self.store.take(self.batch)
            self.trouble = None
            if not tasks:
                return
            self._hand = [task.picture for task in tasks]
            # What is relit is drawn one by one: each has a mask and a detail of its own.
            for together in [tasks] if tasks[0].request["kind"] != "relight" else [[task] for task in tasks]:
                self._draw(together)
            self._hand = []

    def _stored(self, write: Callable[[], Result]) -> Result:
        """What the store says to `write`, as soon as it can be written to, so that nothing is drawn twice."""
        while True:
            try:
                written = write()
            except Unwritable as error:
                if self._wait(str(error)):
                    raise
            else:
                self.trouble = None
                return written

    def _draw(self, tasks: Sequence[QueuedImage]) -> None:
        started = time.monotonic()
        try:
            images = self._generate(tasks)
        except _Stopped:
            self._stored(lambda: self.store.requeue([task.picture for task in tasks]))
            return
        except UserError as error:
            if len(tasks) > 1:
                for task in tasks:
                    self._draw([task])
                return
            self._fail(tasks[0], describe(error, limit=None))
            return
        except Exception:
            log.exception("a batch of %d could not be drawn", len(tasks))
            for task in tasks:
                self._fail(task, "an error inside the server; its log says more")
            return
        seconds = time.monotonic() - started
        self.seconds += (seconds - self.seconds) / 4
        self.metrics.draw.observe(seconds)
        self.metrics.batch.observe(len(tasks))
        for task, image in zip(tasks, images, strict=True):
            self._keep(task, image)

    def _generate(self, tasks: Sequence[QueuedImage]) -> list[Image]:
        from PIL import Image

        assert self.student is not None
        self._use_speed(tasks[0].request.get("speed"))
        opened: dict[bytes, Any] = {}  # one object for each picture, so that the pipeline can tell a repeated one
        for task in tasks:
            for name, png in (("reference", task.reference), ("mask", task.mask)):
                if png is not None and png not in opened:
                    opened[png] = Image.open(io.BytesIO(png)).convert("RGB")
                elif png is None and task.request[name] is not None:
                    raise UserError(f"the {name} is no longer there; send it again")
        pictures = [task.picture for task in tasks]

        def on_step(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            for job in {task.job for task in tasks}:
                self.board.tell(job, step + 1, pipe.num_timesteps)
            if self._abandon.is_set() or len(self.store.cancelled(pictures)) == len(pictures):
                raise _Stopped
            return {}

        def on_preview(done: int, steps: int, images: list[Image.Image]) -> None:
            for task, image in zip(tasks, images, strict=True):
                self.board.tell(task.job, done, steps, {task.place: encode_png(image)})

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
        """The speed that a request asked for by name, or the server's own."""
        from diptych.student.runtime import speed as speeds
        from diptych.student.runtime.applied import apply_speed

        assert self.student is not None
        wanted = self._own_speed if name is None else speeds.parse(None if name == "plain" else name)
        if wanted != self._speed:
            apply_speed(self.student.pipeline, wanted)
            self._speed = wanted

    def _keep(self, task: QueuedImage, image: Image) -> None:
        made_by = {**image.info, "job": task.job_id, "digital_source_type": source_type(image.info)}
        if self.watermark is not None:
            image = mark(image, self.watermark)
            made_by["watermark"] = True
        kind = KINDS[task.request["output_format"]]
        try:
            data = encode(image, kind, made_by)
        except UserError as error:
            self._fail(task, str(error))
            return
        if self._stored(lambda: self.store.finish(task.picture, kind, data, made_by)):
            self.metrics.pictures.inc()
        job = self.store.job(task.owner, task.job_id)
        if job is not None and job["status"] == "done":
            self.metrics.jobs.labels("done").inc()
            self.board.end(task.job)
        else:
            self.board.tell(task.job)

    def _fail(self, task: QueuedImage, reason: str) -> None:
        self._stored(lambda: self.store.fail(task.job, reason))
        self.metrics.jobs.labels("failed").inc()
        self.board.end(task.job)


class _Stopped(Exception):
    """Nobody wants the batch in hand any more, or the server must stop."""


STRENGTH = 3  # of 255
SURE = 5.0  # a score above it comes by chance less than once in a million pictures


def mark(image: Image, key: str) -> Image:
    """An RGB picture with the mark of `key`."""
    from PIL import Image

    pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
    marked = pixels + STRENGTH * _signs(key, pixels.shape[:2])[..., None]
    return Image.fromarray(marked.clip(0, 255).astype(np.uint8))


def score(image: Image, key: str) -> float:
    """How surely a picture has the mark of `key`, in standard deviations."""
    grey = np.asarray(image.convert("RGB"), dtype=np.float64).mean(axis=2)
    residual, signs = _rough(grey), _rough(_signs(key, grey.shape).astype(np.float64))
    norm = float(np.sqrt((residual**2).sum() * (signs**2).mean()))
    return float((residual * signs).sum() / norm) if norm else 0.0


def _signs(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """(h, w) of -1 and 1."""
    height, width = shape
    digest = hashlib.sha256(f"diptych watermark 1\0{key}\0{width}x{height}".encode()).digest()
    drawn = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
    return drawn.integers(0, 2, (height, width), dtype=np.int16) * 2 - 1


def _rough(values: np.ndarray) -> np.ndarray:
    """(h, w) less the mean of each 3×3 neighbourhood."""
    around = np.pad(values, 1, mode="edge")
    height, width = values.shape
    mean = sum(around[i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9
    return values - mean
