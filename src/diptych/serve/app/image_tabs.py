"""The Create tab: a reference, a prompt, and the pictures that come of them, drawn as jobs like those of the API."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from diptych.apps import enhance
from diptych.errors import UserError
from diptych.serve.app import job as jobs
from diptych.serve.app import owner_of, unread
from diptych.serve.request_models import ImageRequest
from diptych.serve.service import Service
from diptych.utils.markup import Html, escape, tag


def add(blocks: Any, service: Service) -> None:
    """The tab's components and what they do."""
    limits = service.settings.limits
    about = gr.HTML(elem_id="about")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            gr.HTML(
                jobs.drop(
                    "reference", "Reference: a picture of your subject", "Drop it here, paste it, or choose a file"
                )
            )
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
                    size = gr.Textbox(label="Size, as 64 or 64x96", max_length=11, min_width=100)
                    fit = gr.Dropdown(["crop", "pad", "contain"], value="crop", label="How the reference meets it")
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop", elem_id="stop")
    job = gr.State("")
    shown = gr.HTML(elem_id="pictures", elem_classes="dq-status")

    def on_draw(request: gr.Request, *given: Any) -> Iterator[tuple[str, str]]:
        names = ("reference", "prompt", "seed", "n", "steps", "image_guidance", "text_guidance", "negative_prompt")
        asked: dict[str, Any] = dict(zip((*names, "size", "fit"), given, strict=True))
        yield from jobs.drawn(
            service, owner_of(request), ImageRequest, asked, asked.pop("reference"), unread=unread(blocks, request)
        )

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
    stop.click(on_stop, job, None, api_visibility="private", concurrency_limit=None)
    enhanced.click(on_enhance, [prompt, reference], prompt, api_visibility="private", concurrency_limit=8)
    blocks.load(lambda: described(service), None, about, api_visibility="private")


def described(service: Service) -> Html:
    """What the model draws and what it cannot, in plain words."""
    student = jobs.student_of(service)
    if student is None:
        return tag("p", "The model is being loaded; open this page again in a moment.", role="status")
    side = student.pipeline.default_panel_size
    told: list[str] = [tag("b", student.name), f" draws {side}×{side} pixels."]
    if side < jobs.SMALL:
        told.append(" It is a small model: expect the idea of a scene, not a picture to hang up. ")
        told.append("Fine patterns, hands, writing and likeness are beyond it.")
    if student.words is not None:
        told.append(f" It knows {len(student.words)} words; others it cannot show.")
        told.append(tag("details", tag("summary", "The words it knows"), ", ".join(sorted(student.words))))
    return tag("div", *told, class_="dq-small")


def longer(service: Service, owner: str, prompt: str, reference: str) -> str:
    """The prompt, filled out from the reference by the vision-language model that the environment names."""
    png = service.store.reference(owner, reference) if reference else None
    if png is None or not prompt.strip():
        raise gr.Error("Give a reference and a prompt first.", print_exception=False)
    try:
        service.limit(owner, stores=False)
        with Image.open(io.BytesIO(png)) as image:
            loading = service.settings.loading
            length = enhance.length_of(str(loading["model"]), loading.get("base"))
            return enhance.enhance(prompt, image.convert("RGB"), enhance.endpoint_of(None, None), length=length)
    except UserError as error:
        raise gr.Error(escape(error), print_exception=False) from None
