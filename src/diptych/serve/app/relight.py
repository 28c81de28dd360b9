"""The Relight tab: a picture under other lights, everything in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from diptych.apps.relight import DETAIL
from diptych.serve.app import job as jobs
from diptych.serve.app import owner_of, unread
from diptych.serve.request_models import RelightRequest
from diptych.serve.service import Service

# Words that the pocket student knows, and any other understands.
PRESETS = (
    "soft golden light from the left",
    "bright white light from above",
    "dim blue light from above",
    "bright pink light from the right",
    "soft green light from behind",
    "dim golden light from behind",
)
ABOUT = (
    "The scene stays as it is; only the light is drawn anew, and fine detail is your picture's own unless you say less."
)
SMALL = (
    "This small model knows light in broad strokes: its colour, its strength and its side. Sharp new shadows, lamps, "
    "reflections and the light of real photographs are beyond it."
)


def add(blocks: Any, service: Service) -> None:
    """The tab's components and what they do."""
    about = gr.HTML()
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            gr.HTML(jobs.drop("relight-reference", "Picture to relight", "Drop it here, paste it, or choose a file"))
            reference = gr.Textbox(
                elem_id="relight-reference", elem_classes="dq-wire", label="reference", container=False
            )
            with gr.Accordion("Keep a part as it is", open=False):
                gr.HTML(jobs.drop("relight-mask", "Mask: white may change, black stays", "As large as the picture"))
                mask = gr.Textbox(elem_id="relight-mask", elem_classes="dq-wire", label="mask", container=False)
        with gr.Column(scale=3, min_width=280):
            presets = gr.CheckboxGroup(list(PRESETS), label="Lights; several make a strip", elem_id="lights")
            own = gr.Textbox(label="Other lights, in words, one a line", lines=2, elem_id="own-lights", max_length=4000)
            with gr.Row():
                seed = gr.Textbox(label="Seed (empty: by lot)", elem_id="relight-seed", max_length=19, min_width=120)
                detail = gr.Slider(0, 1, DETAIL, step=0.05, label="Detail kept from your picture", min_width=120)
            with gr.Accordion("More settings (empty: the model's own)", open=False):
                scene = gr.Textbox(label="What the picture shows, as: a cat in a cave", max_length=1000)
                with gr.Row():
                    steps = gr.Textbox(label="Steps", elem_id="relight-steps", max_length=4, min_width=100)
                    image_guidance = gr.Textbox(label="Strength of the picture", max_length=8, min_width=100)
                    text_guidance = gr.Textbox(label="Strength of the light", max_length=8, min_width=100)
            with gr.Row():
                draw = gr.Button("Relight", variant="primary", elem_id="relight")
                stop = gr.Button("Stop")
    job = gr.State("")
    shown = gr.HTML(elem_id="relit", elem_classes="dq-status")

    def on_draw(
        request: gr.Request, sent: str, kept: str, chosen: list[str], written: str, *given: Any
    ) -> Iterator[tuple[str, str]]:
        names = ("seed", "detail", "scene", "steps", "image_guidance", "text_guidance")
        asked: dict[str, Any] = dict(zip(names, given, strict=True))
        asked["light"] = [*chosen, *(line.strip() for line in written.splitlines() if line.strip())]
        if not sent:
            yield "", jobs.wrong("Give the picture that is to be relit.")
            return
        yield from jobs.drawn(
            service, owner_of(request), RelightRequest, asked, sent, kept, unread=unread(blocks, request)
        )

    def on_stop(request: gr.Request, id: str) -> None:
        service.cancel(owner_of(request), id)

    hidden: Any = {"api_visibility": "private"}
    given = [reference, mask, presets, own, seed, detail, scene, steps, image_guidance, text_guidance]
    draw.click(on_draw, given, [job, shown], concurrency_limit=64, show_progress="hidden", **hidden)
    stop.click(on_stop, job, None, concurrency_limit=None, **hidden)
    blocks.load(lambda: jobs.note(service, SMALL, ABOUT), None, about, **hidden)
