"""What the tabs that draw have in common: where a picture is dropped, a request made of a page's fields, and a job that
is followed as HTML while it is drawn, as any client of the API could follow it."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

from pydantic import ValidationError

from diptych.errors import UserError
from diptych.serve.asked import Common
from diptych.serve.errors import wrong as wrong_field
from diptych.serve.fields import of_schema
from diptych.serve.refusals import Busy
from diptych.serve.service import Service

UNREAD = 4  # messages that may wait for a page
EVERY = 0.25  # seconds between looks at a job
SMALL = 256  # pixels: what a model below it draws shows little


def drop(to: str, label: str, hint: str) -> str:
    """Where a picture is dropped, pasted or chosen; its id then stands in the field `to`."""
    return (
        f'<label class="dq-drop" data-to="{to}" data-hint="{hint}"><input type="file" accept="image/*" '
        f'aria-label="{label}"><b>{label}</b><img alt="{label}" hidden><span>{hint}</span><span role="alert"></span>'
        "</label>"
    )


def student_of(service: Service) -> Any:
    """The student, None while it is being loaded."""
    try:
        return service.student
    except Busy:
        return None


def note(service: Service, small: str, always: str = "") -> str:
    """What a tab's job can and cannot be expected to give, the more so of a small model."""
    student = student_of(service)
    told = small if student is not None and student.pipeline.default_panel_size < SMALL else ""
    return f'<div class="dq-small">{escape(" ".join(filter(None, (always, told))))}</div>'


def drawn(
    service: Service,
    owner: str,
    model: type[Common],
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
        yield "", wrong(str(error))
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


def _said(error: ValidationError, model: type[Common]) -> str:
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


def wrong(text: str) -> str:
    """Something went wrong, as HTML."""
    return f'<div class="dq-wrong" role="alert">{escape(text)}</div>'


def shown(state: dict[str, Any], previews: Mapping[int, bytes], reference: str | None) -> str:
    """A job as HTML: what to know of it, how far it is, its pictures, and once it is done what it makes together."""
    progress = state["progress"]
    remarks = [f"{line[:1].upper()}{line[1:]}." for line in state["warnings"]]
    if not reference and state["kind"] != "relight":
        remarks.insert(0, "There is no reference: drawn from text alone.")
    parts = [f'<p class="dq-small">{escape(line)}</p>' for line in remarks]
    if state["status"] == "queued":
        parts.append(f'<p role="status">Waiting; {state["waiting_before"]} pictures come before.</p>')
    elif state["status"] == "running":
        share = progress["done"] * (progress["steps"] or 1) + progress["step"]
        whole = progress["of"] * (progress["steps"] or 1)
        parts.append(f'<p role="status">Drawing: step {progress["step"]} of {progress["steps"]}, '
                     f'{progress["done"]} of {progress["of"]} done</p>'
                     f'<progress max="{whole}" value="{min(share, whole)}"></progress>')  # fmt: skip
    elif state["status"] == "failed":
        parts.append(wrong(state["error"]))
    elif state["status"] == "cancelled":
        parts.append('<p role="status">Stopped.</p>')
    else:
        parts.append(_together(state))
    figures = [_figure(state, place, previews, reference) for place in range(len(state["pictures"]))]
    return "".join(parts) + f'<div class="dq-gallery" data-status="{state["status"]}">{"".join(figures)}</div>'


def _together(state: dict[str, Any]) -> str:
    """What the pictures of a finished job make: a story's page, a strip of lights."""
    page = f"/v1/jobs/{state['id']}/page"
    if state["kind"] == "story":
        seeds = " ".join(str(picture["seed"]) for picture in state["pictures"])
        return (
            f'<img class="dq-page done" src="{page}" alt="the page">'
            f'<p class="dq-buttons"><a class="dq-button" href="{page}" download="story.png">Save as PNG</a>'
            f'<a class="dq-button" href="{page}?format=pdf" download="story.pdf">Save as PDF</a>'
            f'<button type="button" data-put="story-seed" data-value="{seeds}">Use these seeds</button></p>'
        )
    if state["kind"] == "relight" and len(state["pictures"]) > 1:
        return (
            f'<p class="dq-buttons"><a class="dq-button" href="{page}" download="lights.png">'
            "Save all as one strip</a></p>"
        )
    return ""


def _figure(state: dict[str, Any], place: int, previews: Mapping[int, bytes], reference: str | None) -> str:
    picture, kind = state["pictures"][place], state["kind"]
    seed = picture["seed"]
    text = "" if kind == "images" else f"<span>{escape(picture['text'])}</span>"
    if picture["status"] != "done":
        if place not in previews:
            return ""
        data = base64.b64encode(previews[place]).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="preview">'
        return f"<figure>{image}<figcaption>{text}<span>seed {seed}</span></figcaption></figure>"
    address = f"/v1/pictures/{picture['id']}"
    image = f'<img class="done" src="{address}" alt="picture with seed {seed}">'
    if reference and kind != "story":
        # What was sent and what came of it, one over the other, and a slider between them.
        image = (
            f'<div class="dq-compare"><img class="before" src="/v1/references/{reference}" alt="the reference">'
            f'<img class="after done" src="{address}" alt="picture with seed {seed}"></div>'
            '<input class="dq-compare-range" type="range" min="0" max="100" value="100" '
            'aria-label="from the reference (left) to the picture (right)">'
        )
    to = {"images": "seed", "relight": "relight-seed"}.get(kind)
    again = f'<button type="button" data-put="{to}" data-value="{seed}">Use this seed</button>' if to else ""
    told = picture["settings"] or {}
    return (
        f"<figure>{image}<figcaption>{text}<span>seed {seed}, {told.get('steps')} steps</span>{again}"
        f'<a class="dq-button" href="{address}" download="diptych-{seed}.png">Save</a></figcaption></figure>'
    )
