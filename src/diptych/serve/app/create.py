"""The Create tab: a reference, a prompt, and the pictures that come of them, drawn as jobs like those of the API."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr
from PIL import Image
from pydantic import ValidationError

from diptych import enhance
from diptych.errors import UserError
from diptych.serve.app import owner_of
from diptych.serve.asked import Asked
from diptych.serve.service import Busy, Service

EVERY = 0.25  # seconds between looks at a job
SMALL = 256  # pixels: what a model below it draws shows little
DROP = """<label class="dq-drop"><input type="file" accept="image/*" aria-label="Reference: a picture of your subject">
<img alt="the reference" hidden><br><span>Drop a picture of your subject here, paste it, or choose a file</span>
<div role="alert"></div></label>"""


def add(blocks: Any, service: Service) -> None:
    """The tab's components and what they do."""
    limits = service.settings.limits
    about = gr.HTML(elem_id="about")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            gr.HTML(DROP)
            reference = gr.Textbox(elem_id="reference", elem_classes="dq-wire", label="reference", container=False)
        with gr.Column(scale=3, min_width=280):
            prompt = gr.Textbox(
                label="Prompt: what the new picture shows, the whole of it", lines=3, elem_id="prompt", max_length=4000
            )
            enhanced = gr.Button("Enhance the prompt", size="sm", visible=enhance.endpoint_of(None, None) is not None)
            with gr.Row():
                seed = gr.Textbox(label="Seed (empty: by lot)", elem_id="seed", max_length=19, min_width=120)
                count = gr.Slider(1, min(10, limits.pictures), 1, step=1, label="Pictures", min_width=120)
            with gr.Accordion("More settings (empty: the model's own)", open=False):
                with gr.Row():
                    steps = gr.Textbox(label="Steps", elem_id="steps", max_length=4, min_width=100)
                    image_guidance = gr.Textbox(label="Strength of the reference", max_length=8, min_width=100)
                    text_guidance = gr.Textbox(label="Strength of the prompt", max_length=8, min_width=100)
                negative = gr.Textbox(label="What not to show", max_length=4000)
                with gr.Row():
                    size = gr.Textbox(label="Size, as 32 or 32x48", max_length=11, min_width=100)
                    fit = gr.Dropdown(["crop", "pad", "contain"], value="crop", label="How the reference meets it")
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop", elem_id="stop")
    job = gr.State("")
    shown = gr.HTML(elem_id="pictures", elem_classes="dq-status")

    def on_draw(request: gr.Request, *given: Any) -> Iterator[tuple[str, str]]:
        names = ("reference", "prompt", "seed", "n", "steps", "image_guidance", "text_guidance", "negative_prompt")
        asked: dict[str, Any] = dict(zip((*names, "size", "fit"), given, strict=True))
        yield from drawn(service, owner_of(request), asked)

    def on_stop(request: gr.Request, id: str) -> None:
        service.cancel(owner_of(request), id)

    def on_enhance(request: gr.Request, text: str, reference_id: str) -> str:
        return longer(service, owner_of(request), text, reference_id)

    given = [reference, prompt, seed, count, steps, image_guidance, text_guidance, negative, size, fit]
    gr.on(
        [draw.click, prompt.submit],
        on_draw,
        given,
        [job, shown],
        concurrency_limit=64,
        show_progress="hidden",
        api_visibility="private",
    )
    stop.click(on_stop, job, None, api_visibility="private", concurrency_limit=None, queue=False)
    enhanced.click(on_enhance, [prompt, reference], prompt, api_visibility="private")
    blocks.load(lambda: described(service), None, about, api_visibility="private")


def described(service: Service) -> str:
    """What the model draws and what it cannot, in plain words."""
    try:
        student = service.student
    except Busy:
        return '<p role="status">The model is being loaded; open this page again in a moment.</p>'
    side = student.pipeline.default_panel_size
    told = f"<b>{escape(student.name)}</b> draws {side}×{side} pixels."
    if side < SMALL:
        told += " It is a small model: expect the idea of a scene, not a picture to hang up. "
        told += "Fine patterns, hands, writing and likeness are beyond it."
    if student.words is not None:
        told += f" It knows {len(student.words)} words; others it cannot show."
        listed = escape(", ".join(sorted(student.words)))
        told += f"<details><summary>The words it knows</summary>{listed}</details>"
    return f'<div class="dq-small">{told}</div>'


def drawn(service: Service, owner: str, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(job, HTML) as the pictures of a request come about."""
    reference = given.pop("reference") or None
    try:
        asked = Asked(**{name: value for name, value in given.items() if value not in (None, "")}, partial_images=1)
        if reference is not None and service.store.reference(owner, reference) is None:
            raise UserError("The reference is no longer there; send it again.")
        service.limit(owner)
        job = service.submit(owner, asked, reference)
    except ValidationError as error:
        first = error.errors()[0]
        said = "Say in the prompt what the new picture shows." if "prompt" in first["loc"] else first["msg"]
        where = "" if "prompt" in first["loc"] else f"{'.'.join(map(str, first['loc']))}: "
        yield "", _wrong(where + said)
        return
    except UserError as error:
        yield "", _wrong(str(error))
        return
    unknown = service.student.unknown_words(asked.prompt)
    note = f"The model does not know {', '.join(map(repr, unknown))}: the picture will not show it." if unknown else ""
    last = ""
    while (state := service.state(owner, job["id"])) is not None:
        live = service.board.live(job["number"])
        page = _page(state, live.previews, reference, note)
        if page != last:
            last = page
            yield job["id"], page
        if not service.is_open(state):
            return
        if service.draining:
            yield job["id"], _wrong("The server is stopping; what was accepted goes on when it starts again.")
            return
        time.sleep(EVERY)


def longer(service: Service, owner: str, prompt: str, reference: str) -> str:
    """The prompt, filled out from the reference by the vision-language model that the environment names."""
    png = service.store.reference(owner, reference) if reference else None
    if png is None or not prompt.strip():
        raise gr.Error("Give a reference and a prompt first.", print_exception=False)
    try:
        service.limit(owner)
        with Image.open(io.BytesIO(png)) as image:
            return enhance.enhance(prompt, image.convert("RGB"), enhance.endpoint_of(None, None))
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _wrong(text: str) -> str:
    return f'<div class="dq-wrong" role="alert">{escape(text)}</div>'


def _page(state: dict[str, Any], previews: dict[int, bytes], reference: str | None, note: str) -> str:
    progress, parts = state["progress"], []
    if note:
        parts.append(f'<p class="dq-small">{escape(note)}</p>')
    if state["status"] == "queued":
        parts.append(f'<p role="status">Waiting; {state["waiting_before"]} pictures come before.</p>')
    elif state["status"] == "running":
        share = progress["done"] * (progress["steps"] or 1) + progress["step"]
        whole = progress["of"] * (progress["steps"] or 1)
        parts.append(f'<p role="status">Drawing: step {progress["step"]} of {progress["steps"]}, '
                     f'{progress["done"]} of {progress["of"]} done</p>'
                     f'<progress max="{whole}" value="{min(share, whole)}"></progress>')  # fmt: skip
    elif state["status"] == "failed":
        parts.append(_wrong(state["error"]))
    elif state["status"] == "cancelled":
        parts.append('<p role="status">Stopped.</p>')
    figures = [_figure(place, p, previews, reference) for place, p in enumerate(state["pictures"])]
    return "".join(parts) + f'<div class="dq-gallery" data-status="{state["status"]}">{"".join(figures)}</div>'


def _figure(place: int, picture: dict[str, Any], previews: dict[int, bytes], reference: str | None) -> str:
    seed = picture["seed"]
    if picture["status"] != "done":
        if place not in previews:
            return ""
        data = base64.b64encode(previews[place]).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="preview">'
        return f"<figure>{image}<figcaption>seed {seed}</figcaption></figure>"
    address = f"/v1/pictures/{picture['id']}"
    image = f'<img class="done" src="{address}" alt="picture with seed {seed}">'
    if reference is not None:
        # What was sent and what came of it, one over the other, and a slider between them.
        image = (
            f'<div class="dq-compare"><img class="before" src="/v1/references/{reference}" alt="the reference">'
            f'<img class="after done" src="{address}" alt="picture with seed {seed}"></div>'
            '<input class="dq-compare-range" type="range" min="0" max="100" value="100" '
            'aria-label="from the reference (left) to the picture (right)">'
        )
    told = picture["settings"] or {}
    return (
        f"<figure>{image}<figcaption><span>seed {seed}, {told.get('steps')} steps</span>"
        f'<button type="button" data-put="seed" data-value="{seed}">Use this seed</button>'
        f'<a class="dq-button" href="{address}" download="diptych-{seed}.png">Save</a></figcaption></figure>'
    )
