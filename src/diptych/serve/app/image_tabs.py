"""The Create, Relight and Story tabs: their fields become a request, and its job is followed while it is drawn, as any
client of the API could follow it."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gradio as gr
from markupsafe import escape
from PIL import Image
from pydantic import ValidationError

from diptych.apps import enhance
from diptych.apps.relight import DETAIL
from diptych.apps.story import CAPTIONS, FEWEST, MOST, write_panels
from diptych.errors import UserError
from diptych.serve.app import owner_of, unread
from diptych.serve.http.error_responses import wrong
from diptych.serve.http.openapi import of_schema
from diptych.serve.http.pages import error, render
from diptych.serve.limits import Busy
from diptych.serve.request_models import ImageRequest, JobRequest, RelightRequest, StoryRequest
from diptych.serve.service import Service

UNREAD = 4  # messages that may wait for a page
EVERY = 0.25  # seconds between looks at a job
SMALL = 256  # pixels: what a model below it draws shows little
HIDDEN: Any = {"api_visibility": "private"}
DROP = "Drop it here, paste it, or choose a file"
# Words that the pocket student knows, and any other understands.
LIGHTS = (
    "soft golden light from the left",
    "bright white light from above",
    "dim blue light from above",
    "bright pink light from the right",
    "soft green light from behind",
    "dim golden light from behind",
)
PANELS = """a cat on the beach | One morning it set out.
a cat in a forest, dim blue light from above | At night it was lost.
a cat on the moon | Very lost.
a cat sleeping in a kitchen | Home."""
# What is missing, for somebody who sees the page's labels and not the fields' names.
MISSING = {
    "prompt": "Say in the prompt what the new picture shows.",
    "light": "Choose a light, or write one.",
    "panel": "Write the panels, one a line: 4 to 10 of them.",
}


def add_create(blocks: Any, service: Service) -> None:
    """The Create tab: a reference, a prompt, and the pictures that come of them."""
    about = gr.HTML(elem_id="about")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            reference = _drop("reference", "Reference: a picture of your subject")
        with gr.Column(scale=3, min_width=280):
            prompt = gr.Textbox(
                label="Prompt: what the new picture shows, the whole of it", lines=3, elem_id="prompt", max_length=4000
            )
            enhanced = gr.Button("Enhance the prompt", size="sm", visible=enhance.endpoint_of(None, None) is not None)
            with gr.Row():
                seed = _text("Seed (random if empty)", 19, "seed", width=120)
                most = min(10, service.settings.limits.pictures)
                count = gr.Slider(1, most, 1, step=1, label="Pictures", min_width=120)
            with gr.Accordion("More settings (empty: the model's own)", open=False):
                sampling = _sampling("")
                negative = gr.Textbox(label="What not to show", max_length=4000)
                with gr.Row():
                    size = _text("Size, as 64 or 64x96", 11)
                    fit = gr.Dropdown(["crop", "pad", "contain"], value="crop", label="How the reference meets it")
            draw, stop = _buttons("Draw", "draw")
    fields = {"reference": reference, "prompt": prompt, "seed": seed, "n": count, **sampling}
    fields |= {"negative_prompt": negative, "size": size, "fit": fit}
    _connect(blocks, service, ImageRequest, fields, [draw.click, prompt.submit], stop, "pictures")

    def on_enhance(request: gr.Request, text: str, reference_id: str) -> str:
        return longer(service, owner_of(request), text, reference_id)

    enhanced.click(on_enhance, [prompt, reference], prompt, concurrency_limit=8, **HIDDEN)
    blocks.load(lambda: described(service), None, about, **HIDDEN)


def add_relight(blocks: Any, service: Service) -> None:
    """The Relight tab: a picture under other lights, everything in its place."""
    note = gr.HTML()
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            reference = _drop("relight-reference", "Picture to relight")
            with gr.Accordion("Keep a part as it is", open=False):
                mask = _drop("relight-mask", "Mask: white may change, black stays", "As large as the picture")
        with gr.Column(scale=3, min_width=280):
            presets = gr.CheckboxGroup(list(LIGHTS), label="Lights; several make a strip", elem_id="lights")
            own = gr.Textbox(label="Other lights, in words, one a line", lines=2, elem_id="own-lights", max_length=4000)
            with gr.Row():
                seed = _text("Seed (random if empty)", 19, "relight-seed", width=120)
                detail = gr.Slider(0, 1, DETAIL, step=0.05, label="Detail kept from your picture", min_width=120)
            with gr.Accordion("More settings (empty: the model's own)", open=False):
                scene = gr.Textbox(label="What the picture shows, as: a cat in a cave", max_length=1000)
                sampling = _sampling("relight-", "Strength of the picture", "Strength of the light")
            draw, stop = _buttons("Relight", "relight")

    def lights(given: dict[str, Any]) -> None:
        given["light"] = [*given["light"], *_lines(given.pop("own"))]
        if not given["reference"]:
            raise UserError("Give the picture that is to be relit.")

    fields = {"reference": reference, "mask": mask, "light": presets, "own": own, "seed": seed, "detail": detail}
    _connect(
        blocks, service, RelightRequest, {**fields, "scene": scene, **sampling}, [draw.click], stop, "relit", lights
    )
    always = (
        "The scene stays as it is; only the light changes, and fine detail comes from your image unless you say less."
    )
    small = (
        "This small model knows light in broad strokes: its colour, its strength and its side. Sharp new shadows, "
        "lamps, reflections and the light of real photographs are beyond it."
    )
    blocks.load(lambda: _note(service, always, small), None, note, **HIDDEN)


def add_story(blocks: Any, service: Service) -> None:
    """The Story tab: a page of panels that show one character, from texts of one's own or from an idea."""
    writer = enhance.endpoint_of(None, None) is not None
    note = gr.HTML()
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            reference = _drop("story-reference", "Reference: a picture of your character")
            with gr.Column(visible=writer):
                idea = gr.Textbox(label="An idea, for the language model", lines=2, elem_id="idea", max_length=2000)
                count = gr.Slider(FEWEST, MOST, 6, step=1, label="Panels")
                write = gr.Button("Write the panels", size="sm")
            missing = "No language model is set up here (DIPTYCH_LLM_URL and DIPTYCH_LLM_MODEL name one): the panels "
            gr.HTML("" if writer else f'<p class="dq-small">{missing}are your own.</p>')
        with gr.Column(scale=3, min_width=280):
            title = gr.Textbox(label="Title", elem_id="title", max_length=200)
            panels = gr.Textbox(
                label="Panels, one a line", lines=6, placeholder=PANELS, elem_id="panels", max_length=8000
            )
            with gr.Row():
                seed = _text("Seed, or one per panel (random if empty)", 200, "story-seed", width=160)
                captions = gr.Dropdown(list(CAPTIONS), value="below", label="Words", min_width=120)
            with gr.Accordion("More settings (empty: the model's own)", open=False):
                sampling = _sampling("story-")
            draw, stop = _buttons("Draw the story", "tell")

    def lines(given: dict[str, Any]) -> None:
        given["panel"] = _lines(given["panel"])
        seeds = (given.pop("seed") or "").replace(",", " ").split()
        given |= {"seed": seeds[0]} if len(seeds) == 1 else {"panel_seed": seeds or None}

    fields = {"reference": reference, "panel": panels, "seed": seed, "title": title, "captions": captions, **sampling}
    _connect(blocks, service, StoryRequest, fields, [draw.click], stop, "story", lines)

    def on_write(request: gr.Request, text: str, number: int) -> str:
        return written(service, owner_of(request), text, number)

    write.click(on_write, [idea, count], panels, concurrency_limit=8, **HIDDEN)
    always = (
        f"{FEWEST} to {MOST} panels, one a line: what the panel shows, and after a bar what is written with it. Each "
        "is drawn on its own from the same reference."
    )
    small = (
        "This small model keeps a character's shape and colours, not its every mark, and draws one character, not two; "
        "it cannot draw writing, so words stand below the panels."
    )
    blocks.load(lambda: _note(service, always, small), None, note, **HIDDEN)


def _drop(to: str, label: str, hint: str = DROP) -> Any:
    """Where a picture is dropped, pasted or chosen, and the hidden field that then holds its id."""
    gr.HTML(drop(to, label, hint))
    return gr.Textbox(elem_id=to, elem_classes="dq-wire", label=to, container=False)


def drop(to: str, label: str, hint: str) -> str:
    """Where a picture is dropped, pasted or chosen, as HTML; its id then stands in the field `to`."""
    return render("drop.html", to=to, label=label, hint=hint)


def _text(label: str, length: int, id: str | None = None, width: int = 100) -> Any:
    return gr.Textbox(label=label, elem_id=id, max_length=length, min_width=width)


def _sampling(
    ids: str, image: str = "Strength of the reference", text: str = "Strength of the prompt"
) -> dict[str, Any]:
    """The fields of how to sample."""
    with gr.Row():
        return {
            "steps": _text("Steps", 4, f"{ids}steps"),
            "image_guidance": _text(image, 8),
            "text_guidance": _text(text, 8),
        }


def _buttons(label: str, id: str) -> tuple[Any, Any]:
    with gr.Row():
        return gr.Button(label, variant="primary", elem_id=id), gr.Button("Stop")


def _lines(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def _connect(
    blocks: Any,
    service: Service,
    model: type[JobRequest],
    fields: Mapping[str, Any],
    triggers: list[Any],
    stop: Any,
    to: str,
    convert: Callable[[dict[str, Any]], None] = lambda given: None,
) -> None:
    """Draws what the fields ask for on a trigger, and shows it below in `to`; `convert` makes a request's fields of the
    page's."""
    job = gr.State("")
    shown = gr.HTML(elem_id=to, elem_classes="dq-status")

    def on_draw(request: gr.Request, *values: Any) -> Iterator[tuple[str, str]]:
        given = dict(zip(fields, values, strict=True))
        try:
            convert(given)
        except UserError as refusal:
            yield "", error(refusal)
            return
        yield from followed(service, owner_of(request), model, given, unread(blocks, request))

    def on_stop(request: gr.Request, id: str) -> None:
        service.cancel(owner_of(request), id)

    options: Any = {"concurrency_limit": 64, "show_progress": "hidden", **HIDDEN}
    gr.on(triggers, on_draw, list(fields.values()), [job, shown], **options)
    stop.click(on_stop, job, None, concurrency_limit=None, **HIDDEN)


def followed(
    service: Service, owner: str, model: type[JobRequest], given: dict[str, Any], unread: Callable[[], int]
) -> Iterator[tuple[str, str]]:
    """(job, HTML) as the pictures of a request come about. Empty fields are left out. `unread` counts the messages that
    the page has not read; while there are several, it is sent nothing but the end."""
    reference, mask = given.pop("reference"), given.pop("mask", None)
    try:
        asked = model(**{name: value for name, value in given.items() if value not in (None, "")}, partial_images=1)
        for id, name in ((reference, "picture"), (mask, "mask")):
            if id and service.store.reference(owner, id) is None:
                raise UserError(f"The {name} is no longer there; send it again.")
        service.limit(owner)
        job = service.submit(owner, asked, reference or None, mask or None)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        field = str(first["loc"][0])
        known = of_schema(model.model_json_schema())
        yield "", error(MISSING.get(field) or f"{field.replace('_', ' ')}: {wrong(first, known)}")
        return
    except UserError as refusal:
        yield "", error(refusal)
        return
    last = ""
    while (state := service.state(owner, job["id"])) is not None:
        page = shown(state, service.board.live(job["number"]).previews, reference)
        if page != last and (unread() < UNREAD or not service.is_open(state)):
            last = page
            yield job["id"], page
        if not service.is_open(state):
            return
        if service.draining:
            yield job["id"], error("The server is stopping; what was accepted goes on when it starts again.")
            return
        time.sleep(EVERY)


def shown(state: dict[str, Any], previews: Mapping[int, bytes], reference: str | None) -> str:
    """A job as HTML: what to know of it, how far it is, its pictures, and once it is done what it makes together."""
    encoded = {place: base64.b64encode(png).decode() for place, png in previews.items()}
    return render("job.html", job=state, previews=encoded, reference=reference)


def _student_of(service: Service) -> Any:
    """The student, None while it is being loaded."""
    try:
        return service.student
    except Busy:
        return None


def described(service: Service) -> str:
    """What the model draws and what it cannot, in plain words."""
    student = _student_of(service)
    side = student.pipeline.default_panel_size if student is not None else 0
    return render("about.html", student=student, side=side, small=side < SMALL)


def _note(service: Service, always: str, small: str) -> str:
    """What a tab's job can and cannot be expected to give, the more so of a small model."""
    student = _student_of(service)
    limited = student is not None and student.pipeline.default_panel_size < SMALL
    return render("note.html", text=f"{always} {small}" if limited else always)


def longer(service: Service, owner: str, prompt: str, reference: str) -> str:
    """The prompt, filled out from the reference by the vision-language model that the environment names."""
    png = service.store.reference(owner, reference) if reference else None
    if png is None or not prompt.strip():
        raise _alert("Give a reference and a prompt first.")
    try:
        service.limit(owner, stores=False)
        with Image.open(io.BytesIO(png)) as image:
            loading = service.settings.loading
            length = enhance.length_of(str(loading["model"]), loading.get("base"))
            return enhance.enhance(prompt, image.convert("RGB"), enhance.endpoint_of(None, None), length=length)
    except UserError as refusal:
        raise _alert(refusal) from None


def written(service: Service, owner: str, idea: str, count: int) -> str:
    """The panels of an idea, from the language model that the environment names, as lines."""
    endpoint = enhance.endpoint_of(None, None)
    if endpoint is None or not idea.strip():
        raise _alert("Say in a line what happens in the story.")
    try:
        service.limit(owner, stores=False)
        return "\n".join(f"{panel.prompt} | {panel.caption}" for panel in write_panels(idea, int(count), endpoint))
    except UserError as refusal:
        raise _alert(refusal) from None


def _alert(text: object) -> gr.Error:
    """An error as Gradio shows it, which takes HTML."""
    return gr.Error(str(escape(text)), print_exception=False)
