"""Jobs as they go on: waiting for one, and telling of it in server-sent events, ours and OpenAI's."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from diptych.serve.progress import Busy
from diptych.serve.request_models import JobRequest
from diptych.serve.service import Service, as_json, warnings_of

PULSE = 1.0  # seconds between looks when nothing happens
KEEP_ALIVE = 15.0  # seconds between comments that keep a quiet stream open


def event(name: str, data: Any) -> str:
    """One server-sent event."""
    return f"event: {name}\ndata: {as_json(data)}\n\n"


async def finished_job(service: Service, owner: str, id: str, request: Request, keep: bool) -> dict[str, Any] | None:
    """A job once it has ended; None if its client left. Then it is given up too, unless `keep`.

    Busy if the server stops first, TimeoutError after `wait_seconds`, with the job given up unless `keep`.
    """
    until = time.monotonic() + service.settings.limits.wait_seconds
    while True:
        job = service.store.job(owner, id)
        if job is None or not service.is_open(job):
            return job
        _refuse_if_stopping(service, job)
        gone = await request.is_disconnected()
        if gone or time.monotonic() > until:
            if not keep:
                service.cancel(owner, id)
            if gone:
                return None
            raise TimeoutError
        await service.board.changed(job["number"], PULSE)


def _refuse_if_stopping(service: Service, job: dict[str, Any]) -> None:
    if service.draining and all(picture["status"] != "running" for picture in job["pictures"]):
        raise Busy(f"the server is stopping; job {job['id']} goes on when it starts again", 5, 503)


async def job_events(service: Service, owner: str, id: str, previews: bool) -> AsyncIterator[str]:
    """`progress` events with a job's state, each new preview if asked for, and at the end `done`, `failed` or
    `cancelled`; `stopping` if the server stops first."""
    last, shown, spoke = "", {}, time.monotonic()
    while True:
        state = service.state(owner, id)
        if state is None:
            return
        if not service.is_open(state):
            yield event(state["status"], state)
            return
        job = service.store.job(owner, id)
        assert job is not None
        if previews:
            for place, png in sorted(service.board.live(job["number"]).previews.items()):
                if shown.get(place) is not png:
                    shown[place] = png
                    yield event("preview", {"picture": place, "b64_json": base64.b64encode(png).decode()})
        if (now := as_json(state)) != last:
            last, spoke = now, time.monotonic()
            yield event("progress", state)
        elif time.monotonic() - spoke > KEEP_ALIVE:
            spoke = time.monotonic()
            yield ": still here\n\n"
        if service.draining and all(picture["status"] != "running" for picture in job["pictures"]):
            yield event("stopping", state)
            return
        await service.board.changed(job["number"], PULSE)


async def openai_events(service: Service, owner: str, id: str, asked: JobRequest, kind: str) -> AsyncIterator[str]:
    """OpenAI's stream of a request: `image_generation.partial_image` and `image_generation.completed`, or
    `image_edit.…`; an `error` event if it fails."""
    shown: dict[int, bytes] = {}
    sent: dict[int, int] = {}
    complete: set[int] = set()
    while True:
        job = service.store.job(owner, id)
        if job is None:
            return
        told = {"created_at": int(job["created"]), "background": "opaque"}
        told |= {"quality": job["request"].get("quality", "auto")}
        live = service.board.live(job["number"])
        for place, png in sorted(live.previews.items()):
            due = asked.partial_images * live.step // max(1, live.steps)
            if shown.get(place) is not png and sent.get(place, 0) < min(due, asked.partial_images):
                shown[place], sent[place] = png, sent.get(place, 0) + 1
                yield event(f"{kind}.partial_image", _image(f"{kind}.partial_image", png, "png", told)
                    | {"partial_image_index": sent[place] - 1})  # fmt: skip
        for picture in job["pictures"]:
            if picture["status"] == "done" and picture["place"] not in complete:
                complete.add(picture["place"])
                found = service.store.picture(picture["id"])
                assert found is not None
                whole = _image(f"{kind}.completed", found[2], asked.output_format, told)
                nothing = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
                nothing["input_tokens_details"] = {"image_tokens": 0, "text_tokens": 0}  # pyright: ignore
                more = {"seed": picture["seed"], "job": id, "warnings": warnings_of(job, picture), "usage": nothing}
                yield event(f"{kind}.completed", {**whole, **more})
        if not service.is_open(job):
            if job["status"] != "done":
                message = job["error"] or f"the job was {job['status']}"
                yield event("error", {"type": "error", "error": {"message": message, "type": "server_error"}})
            return
        try:
            _refuse_if_stopping(service, job)
        except Busy as busy:
            yield event("error", {"type": "error", "error": {"message": str(busy), "type": "server_error"}})
            return
        await service.board.changed(job["number"], PULSE)


def _image(name: str, data: bytes, output_format: str, told: dict[str, Any]) -> dict[str, Any]:
    import io

    from PIL import Image

    width, height = Image.open(io.BytesIO(data)).size
    image = {"type": name, "b64_json": base64.b64encode(data).decode(), "output_format": output_format}
    return {**image, "size": f"{width}x{height}", **told}
