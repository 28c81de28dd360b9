"""The Create, Relight and Story tabs: their fields become a request, and the page follows its job, as a client of the
API would."""

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
from diptych.apps.story import CAPTIONS, MAX_PANELS, MIN_PANELS, write_panels
from diptych.errors import UserError
from diptych.serve.app import owner_of, unread
from diptych.serve.http.error_responses import wrong
from diptych.serve.http.openapi import of_schema
from diptych.serve.http.pages import error, render
from diptych.serve.limits import Busy
from diptych.serve.request_models import ImageRequest, JobRequest, RelightRequest, StoryRequest
from diptych.serve.service import Service

UNREAD = 4  # unread messages of a page, beyond which only the end of a job is sent
EVERY = 0.25  # seconds between checks of a job
SMALL = 256  # pixels; smaller models get a note about their limits
HIDDEN: Any = {"api_visibility": "private"}
DROP = "Drop, paste, or choose an image"
MORE = "More settings (model's defaults if empty)"
SEED = "Seed (random if empty)"
# In the vocabulary of the pocket student, and plain enough for any other.
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
# Messages for missing fields, in the words of the page's labels.
MISSING = {
    "prompt": "Write a prompt that describes the new image.",
    "light": "Choose a light, or describe one.",
    "panel": "Write 4 to 10 panels, one per line.",
}


def add_create(blocks: Any, service: Service) -> None:
    """Adds the Create tab: a reference and a prompt give images."""
    about = gr.HTML(elem_id="about")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            reference = _drop("reference", "Reference: an image of your subject")
        with gr.Column(scale=3, min_width=280):
            prompt = gr.Textbox(
                label="Prompt: everything the new image shows", lines=3, elem_id="prompt", max_length=4000
            )
            enhanced = gr.Button("Enhance prompt", size="sm", visible=enhance.endpoint_of(None, None) is not None)
            with gr.Row():
                seed = _text(SEED, 19, "seed", width=120)
                limit = min(10, service.settings.limits.pictures)
                count = gr.Slider(1, limit, 1, step=1, label="Images", min_width=120)
            with gr.Accordion(MORE, open=False):
                sampling = _sampling("")
                negative = gr.Textbox(label="Negative prompt (what not to show)", max_length=4000)
                with gr.Row():
                    size = _text("Size in pixels (64 or 64x96)", 11)
                    fit = gr.Dropdown(["crop", "pad", "contain"], value="crop", label="How to fit the reference")
            run, stop = _buttons("Generate", "draw")
    fields = {"reference": reference, "prompt": prompt, "seed": seed, "n": count, **sampling}
    fields |= {"negative_prompt": negative, "size": size, "fit": fit}
    _connect(service, blocks, ImageRequest, fields, [run.click, prompt.submit], stop, "pictures")

    def on_enhance(request: gr.Request, text: str, reference_id: str) -> str:
        return enhanced_prompt(service, owner_of(request), text, reference_id)

    enhanced.click(on_enhance, [prompt, reference], prompt, concurrency_limit=8, **HIDDEN)
    blocks.load(lambda: described(service), None, about, **HIDDEN)


def add_relight(blocks: Any, service: Service) -> None:
    """Adds the Relight tab: an image under other lights, everything in its place."""
    note = gr.HTML()
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            reference = _drop("relight-reference", "Image to relight")
            with gr.Accordion("Keep a part unchanged", open=False):
                mask = _drop("relight-mask", "Mask: white may change, black stays", "Of the image's size")
        with gr.Column(scale=3, min_width=280):
            presets = gr.CheckboxGroup(list(LIGHTS), label="Lights; several give a strip", elem_id="lights")
            others = gr.Textbox(label="Other lights, one per line", lines=2, elem_id="other-lights", max_length=4000)
            with gr.Row():
                seed = _text(SEED, 19, "relight-seed", width=120)
                detail = gr.Slider(0, 1, DETAIL, step=0.05, label="Detail from your image", min_width=120)
            with gr.Accordion(MORE, open=False):
                scene = gr.Textbox(label="Scene of the image (for example: a cat in a cave)", max_length=1000)
                sampling = _sampling("relight-", "Strength of the image", "Strength of the light")
            run, stop = _buttons("Relight", "relight")

    def lights(given: dict[str, Any]) -> None:
        given["light"] = [*given["light"], *_lines(given.pop("others"))]
        if not given["reference"]:
            raise UserError("image_missing", "Add the image to relight.")

    fields = {"reference": reference, "mask": mask, "light": presets, "others": others, "seed": seed, "detail": detail}
    fields |= {"scene": scene, **sampling}
    _connect(service, blocks, RelightRequest, fields, [run.click], stop, "relit", lights)
    always = "Only the light changes; the scene stays. Fine detail comes from your image, as far as the slider says."
    small = (
        "This small model knows the color, strength and side of a light. It cannot generate sharp new shadows, lamps, "
        "reflections, or the light of real photographs."
    )
    blocks.load(lambda: _note(service, always, small), None, note, **HIDDEN)


def add_story(blocks: Any, service: Service) -> None:
    """Adds the Story tab: a page of panels that show one character, from your texts or from an idea."""
    writer = enhance.endpoint_of(None, None) is not None
    note = gr.HTML()
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            reference = _drop("story-reference", "Reference: an image of your character")
            with gr.Column(visible=writer):
                idea = gr.Textbox(label="Idea for the language model", lines=2, elem_id="idea", max_length=2000)
                count = gr.Slider(MIN_PANELS, MAX_PANELS, 6, step=1, label="Panels")
                write = gr.Button("Write panels", size="sm")
            missing = "Write the panels yourself: this server has no language model. To add one, set DIPTYCH_LLM_URL "
            gr.HTML("" if writer else f'<p class="dq-small">{missing}and DIPTYCH_LLM_MODEL.</p>')
        with gr.Column(scale=3, min_width=280):
            title = gr.Textbox(label="Title", elem_id="title", max_length=200)
            panels = gr.Textbox(
                label="Panels, one per line", lines=6, placeholder=PANELS, elem_id="panels", max_length=8000
            )
            with gr.Row():
                seed = _text("Seed, or one per panel (random if empty)", 200, "story-seed", width=160)
                captions = gr.Dropdown(list(CAPTIONS), value="below", label="Captions", min_width=120)
            with gr.Accordion(MORE, open=False):
                sampling = _sampling("story-")
            run, stop = _buttons("Generate story", "run-story")

    def lines(given: dict[str, Any]) -> None:
        given["panel"] = _lines(given["panel"])
        seeds = (given.pop("seed") or "").replace(",", " ").split()
        given |= {"seed": seeds[0]} if len(seeds) == 1 else {"panel_seed": seeds or None}

    fields = {"reference": reference, "panel": panels, "seed": seed, "title": title, "captions": captions, **sampling}
    _connect(service, blocks, StoryRequest, fields, [run.click], stop, "story", lines)

    def on_write(request: gr.Request, text: str, number: int) -> str:
        return written_panels(service, owner_of(request), text, number)

    write.click(on_write, [idea, count], panels, concurrency_limit=8, **HIDDEN)
    always = (
        f"Write {MIN_PANELS} to {MAX_PANELS} panels, one per line: what the panel shows, then | and its caption. Each "
        "panel is generated separately from the same reference."
    )
    small = (
        "This small model keeps a character's shape and colors, but not every detail, and generates one character per "
        "image. It cannot generate writing, so captions are set below the panels."
    )
    blocks.load(lambda: _note(service, always, small), None, note, **HIDDEN)


def _drop(to: str, label: str, hint: str = DROP) -> Any:
    """A zone to drop, paste or choose an image, and the hidden field that then holds its id."""
    gr.HTML(drop(to, label, hint))
    return gr.Textbox(elem_id=to, elem_classes="dq-wire", label=to, container=False)


def drop(to: str, label: str, hint: str) -> str:
    """Returns the HTML of a zone to drop, paste or choose an image, whose id goes into the field `to`."""
    return render("drop.html", to=to, label=label, hint=hint)


def _text(label: str, length: int, id: str | None = None, width: int = 100) -> Any:
    return gr.Textbox(label=label, elem_id=id, max_length=length, min_width=width)


def _sampling(
    ids: str, image: str = "Strength of the reference", text: str = "Strength of the prompt"
) -> dict[str, Any]:
    """The fields of the sampling options."""
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
    service: Service,
    blocks: Any,
    model: type[JobRequest],
    fields: Mapping[str, Any],
    triggers: list[Any],
    stop: Any,
    to: str,
    convert: Callable[[dict[str, Any]], None] = lambda given: None,
) -> None:
    """Runs the request of the fields on a trigger, and shows its job in `to`. `convert` turns the page's fields into
    those of the request."""
    job = gr.State("")
    shown = gr.HTML(elem_id=to, elem_classes="dq-status")

    def on_run(request: gr.Request, *values: Any) -> Iterator[tuple[str, str]]:
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
    gr.on(triggers, on_run, list(fields.values()), [job, shown], **options)
    stop.click(on_stop, job, None, concurrency_limit=None, **HIDDEN)


def followed(
    service: Service, owner: str, model: type[JobRequest], given: dict[str, Any], unread: Callable[[], int]
) -> Iterator[tuple[str, str]]:
    """Yields (job, HTML) while the job of a request runs. Empty fields are left out.

    `unread` counts the unread messages of the page; while there are several, only the end is sent.
    """
    reference, mask = given.pop("reference"), given.pop("mask", None)
    try:
        parsed = model(**{name: value for name, value in given.items() if value not in (None, "")}, partial_images=1)
        for id, name in ((reference, "image"), (mask, "mask")):
            if id and service.store.reference(owner, id) is None:
                raise UserError("job_not_found", f"The {name} has expired. Add it again.")
        service.limit(owner)
        job = service.submit(owner, parsed, reference or None, mask or None)
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
            yield job["id"], error("The server is stopping. The job resumes when it starts again.")
            return
        time.sleep(EVERY)


def shown(state: dict[str, Any], previews: Mapping[int, bytes], reference: str | None) -> str:
    """Returns a job as HTML: its warnings, its progress, its images, and once it is done its page."""
    encoded = {place: base64.b64encode(png).decode() for place, png in previews.items()}
    return render("job.html", job=state, previews=encoded, reference=reference)


def _student_of(service: Service) -> Any:
    """The student, None while it loads."""
    try:
        return service.student
    except Busy:
        return None


def described(service: Service) -> str:
    """Returns what the model can and cannot do, as HTML."""
    student = _student_of(service)
    side = student.pipeline.default_panel_size if student is not None else 0
    return render("about.html", student=student, side=side, small=side < SMALL)


def _note(service: Service, always: str, small: str) -> str:
    """The note of a tab, with the limits of a small model."""
    student = _student_of(service)
    limited = student is not None and student.pipeline.default_panel_size < SMALL
    return render("note.html", text=f"{always} {small}" if limited else always)


def enhanced_prompt(service: Service, owner: str, prompt: str, reference: str) -> str:
    """Returns the prompt, extended from the reference by the vision-language model of the environment."""
    png = service.store.reference(owner, reference) if reference else None
    if png is None or not prompt.strip():
        raise _alert("Add a reference and a prompt first.")
    try:
        service.limit(owner, stores=False)
        with Image.open(io.BytesIO(png)) as image:
            loading = service.settings.loading
            length = enhance.length_of(str(loading["model"]), loading.get("base"))
            return enhance.enhance(prompt, image.convert("RGB"), enhance.endpoint_of(None, None), length=length)
    except UserError as refusal:
        raise _alert(refusal) from None


def written_panels(service: Service, owner: str, idea: str, count: int) -> str:
    """Returns the panels of an idea as lines, written by the language model of the environment."""
    endpoint = enhance.endpoint_of(None, None)
    if endpoint is None or not idea.strip():
        raise _alert("Describe the story in a line first.")
    try:
        service.limit(owner, stores=False)
        return "\n".join(f"{panel.prompt} | {panel.caption}" for panel in write_panels(idea, int(count), endpoint))
    except UserError as refusal:
        raise _alert(refusal) from None


def _alert(text: object) -> gr.Error:
    """An error for Gradio, which shows it as HTML."""
    return gr.Error(str(escape(text)), print_exception=False)
