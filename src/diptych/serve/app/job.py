"""What the tabs that draw have in common: where a picture is dropped, a request made of a page's fields, and a job that
is followed as HTML while it is drawn, as any client of the API could follow it."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from diptych.errors import UserError
from diptych.serve.http.error_responses import wrong as wrong_field
from diptych.serve.http.openapi import of_schema
from diptych.serve.progress import Busy
from diptych.serve.request_models import JobRequest
from diptych.serve.service import Service
from diptych.utils.markup import Html, html, tag

UNREAD = 4  # messages that may wait for a page
EVERY = 0.25  # seconds between looks at a job
SMALL = 256  # pixels: what a model below it draws shows little


def drop(to: str, label: str, hint: str) -> Html:
    """Where a picture is dropped, pasted or chosen; its id then stands in the field `to`."""
    file = tag("input", type="file", accept="image/*", aria_label=label)
    shown = [tag("b", label), tag("img", alt=label, hidden=True), tag("span", hint), tag("span", role="alert")]
    return tag("label", file, *shown, class_="dq-drop", data_to=to, data_hint=hint)


def student_of(service: Service) -> Any:
    """The student, None while it is being loaded."""
    try:
        return service.student
    except Busy:
        return None


def note(service: Service, small: str, always: str = "") -> Html:
    """What a tab's job can and cannot be expected to give, the more so of a small model."""
    student = student_of(service)
    told = small if student is not None and student.pipeline.default_panel_size < SMALL else ""
    return tag("div", " ".join(filter(None, (always, told))), class_="dq-small")


def drawn(
    service: Service,
    owner: str,
    model: type[JobRequest],
    given: Mapping[str, Any],
    reference: str | None = None,
    mask: str | None = None,
    unread: Callable[[], int] = lambda: 0,
) -> Iterator[tuple[str, str]]:
    """(job, HTML) as the pictures of a request come about. Empty fields are left out. `unread` counts the messages that
    the page has not read; while there are several, it is sent nothing but the end."""
    try:
        asked = model(**{name: value for name, value in given.items() if value not in (None, "")}, partial_images=1)
        for id, name in ((reference, "picture"), (mask, "mask")):
            if id and service.store.reference(owner, id) is None:
                raise UserError(f"The {name} is no longer there; send it again.")
        service.limit(owner)
        job = service.submit(owner, asked, reference or None, mask or None)
    except ValidationError as error:
        yield "", wrong(_said(error, model))
        return
    except UserError as error:
        yield "", wrong(error)
        return
    last = ""
    while (state := service.state(owner, job["id"])) is not None:
        live = service.board.live(job["number"])
        page = shown(state, live.previews, reference)
        if page != last and (unread() < UNREAD or not service.is_open(state)):
            last = page
            yield job["id"], page
        if not service.is_open(state):
            return
        if service.draining:
            yield job["id"], wrong("The server is stopping; what was accepted goes on when it starts again.")
            return
        time.sleep(EVERY)


def _said(error: ValidationError, model: type[JobRequest]) -> str:
    """The first of pydantic's findings, for somebody who sees the page's labels and not our names."""
    first = error.errors()[0]
    field = str(first["loc"][0])
    missing = {
        "prompt": "Say in the prompt what the new picture shows.",
        "light": "Choose a light, or write one.",
        "panel": "Write the panels, one a line: 4 to 10 of them.",
    }
    if field in missing:
        return missing[field]
    return f"{field.replace('_', ' ')}: {wrong_field(first, of_schema(model.model_json_schema()))}"


def wrong(error: object) -> Html:
    """Something went wrong, as HTML."""
    return tag("div", error, class_="dq-wrong", role="alert")


def shown(state: dict[str, Any], previews: Mapping[int, bytes], reference: str | None) -> Html:
    """A job as HTML: what to know of it, how far it is, its pictures, and once it is done what it makes together."""
    progress = state["progress"]
    remarks = [f"{line[:1].upper()}{line[1:]}." for line in state["warnings"]]
    if not reference and state["kind"] != "relight":
        remarks.insert(0, "There is no reference: drawn from text alone.")
    parts = [tag("p", line, class_="dq-small") for line in remarks]
    if state["status"] == "queued":
        parts.append(_status(f"Waiting; {state['waiting_before']} pictures come before."))
    elif state["status"] == "running":
        share = progress["done"] * (progress["steps"] or 1) + progress["step"]
        whole = progress["of"] * (progress["steps"] or 1)
        step, done = (f"{progress[one]} of {progress[all_]}" for one, all_ in (("step", "steps"), ("done", "of")))
        parts += [_status(f"Drawing: step {step}, {done} done"), tag("progress", max=whole, value=min(share, whole))]
    elif state["status"] == "failed":
        parts.append(wrong(state["error"]))
    elif state["status"] == "cancelled":
        parts.append(_status("Stopped."))
    else:
        parts.append(_together(state))
    figures = [_figure(state, place, previews, reference) for place in range(len(state["pictures"]))]
    return html(*parts, tag("div", *figures, class_="dq-gallery", data_status=state["status"]))


def _status(text: str) -> Html:
    return tag("p", text, role="status")


def _together(state: dict[str, Any]) -> Html:
    """What the pictures of a finished job make: a story's page, a strip of lights."""
    page = f"/v1/jobs/{state['id']}/page"
    if state["kind"] == "story":
        seeds = " ".join(str(picture["seed"]) for picture in state["pictures"])
        buttons = [
            _save("Save as PNG", page, "story.png"),
            _save("Save as PDF", f"{page}?format=pdf", "story.pdf"),
            tag("button", "Use these seeds", type="button", data_put="story-seed", data_value=seeds),
        ]
        return html(
            tag("img", class_="dq-page done", src=page, alt="the page"), tag("p", *buttons, class_="dq-buttons")
        )
    if state["kind"] == "relight" and len(state["pictures"]) > 1:
        return tag("p", _save("Save all as one strip", page, "lights.png"), class_="dq-buttons")
    return html()


def _save(label: str, address: str, name: str) -> Html:
    return tag("a", label, class_="dq-button", href=address, download=name)


def _figure(state: dict[str, Any], place: int, previews: Mapping[int, bytes], reference: str | None) -> Html:
    picture, kind = state["pictures"][place], state["kind"]
    seed = picture["seed"]
    text = html() if kind == "images" else tag("span", picture["text"])
    if picture["status"] != "done":
        if place not in previews:
            return html()
        data = base64.b64encode(previews[place]).decode()
        image = tag("img", src=f"data:image/png;base64,{data}", alt="preview")
        return tag("figure", image, tag("figcaption", text, tag("span", f"seed {seed}")))
    address, alt = f"/v1/pictures/{picture['id']}", f"picture with seed {seed}"
    image = tag("img", class_="done", src=address, alt=alt)
    if reference and kind != "story":
        # What was sent and what came of it, one over the other, and a slider between them.
        before = tag("img", class_="before", src=f"/v1/references/{reference}", alt="the reference")
        after = tag("img", class_="after done", src=address, alt=alt)
        between = {"type": "range", "min": 0, "max": 100, "value": 100}
        aloud = "from the reference (left) to the picture (right)"
        image = html(
            tag("div", before, after, class_="dq-compare"),
            tag("input", class_="dq-compare-range", aria_label=aloud, **between),
        )
    to = {"images": "seed", "relight": "relight-seed"}.get(kind)
    again = tag("button", "Use this seed", type="button", data_put=to, data_value=seed) if to else html()
    told = picture["settings"] or {}
    steps = tag("span", f"seed {seed}, {told.get('steps')} steps")
    return tag("figure", image, tag("figcaption", text, steps, again, _save("Save", address, f"diptych-{seed}.png")))
