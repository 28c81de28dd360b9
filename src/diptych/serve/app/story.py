"""The Story tab: a page of panels that show one character, from texts of one's own or from an idea."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from diptych.apps.enhance import endpoint_of
from diptych.apps.story import CAPTIONS, FEWEST, MOST
from diptych.errors import UserError
from diptych.serve.app import job as jobs
from diptych.serve.app import owner_of, unread
from diptych.serve.request_models import StoryRequest
from diptych.serve.service import Service
from diptych.utils.markup import escape, tag

EXAMPLE = """a cat on the beach | One morning it set out.
a cat in a forest, dim blue light from above | At night it was lost.
a cat on the moon | Very lost.
a cat sleeping in a kitchen | Home."""
ABOUT = (
    f"{FEWEST} to {MOST} panels, one a line: what the panel shows, and after a bar what is written with it. Each is "
    "drawn on its own from the same reference."
)
SMALL = (
    "This small model keeps a character's shape and colours, not its every mark, and draws one character, not two; "
    "it cannot draw writing, so words stand below the panels."
)
NO_WRITER = (
    "No language model is set up here (DIPTYCH_LLM_URL and DIPTYCH_LLM_MODEL name one): the panels are your own."
)


def add(blocks: Any, service: Service) -> None:
    """The tab's components and what they do."""
    writer = endpoint_of(None, None) is not None
    about = gr.HTML()
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            gr.HTML(
                jobs.drop(
                    "story-reference",
                    "Reference: a picture of your character",
                    "Drop it here, paste it, or choose a file",
                )
            )
            reference = gr.Textbox(
                elem_id="story-reference", elem_classes="dq-wire", label="reference", container=False
            )
            with gr.Column(visible=writer):
                idea = gr.Textbox(label="An idea, for the language model", lines=2, elem_id="idea", max_length=2000)
                count = gr.Slider(FEWEST, MOST, 6, step=1, label="Panels")
                write = gr.Button("Write the panels", size="sm")
            gr.HTML("" if writer else tag("p", NO_WRITER, class_="dq-small"))
        with gr.Column(scale=3, min_width=280):
            title = gr.Textbox(label="Title", elem_id="title", max_length=200)
            panels = gr.Textbox(
                label="Panels, one a line", lines=6, placeholder=EXAMPLE, elem_id="panels", max_length=8000
            )
            with gr.Row():
                seed = gr.Textbox(
                    label="Seed, or one for each panel (empty: by lot)",
                    elem_id="story-seed",
                    max_length=200,
                    min_width=160,
                )
                captions = gr.Dropdown(list(CAPTIONS), value="below", label="Words", min_width=120)
            with gr.Accordion("More settings (empty: the model's own)", open=False), gr.Row():
                steps = gr.Textbox(label="Steps", elem_id="story-steps", max_length=4, min_width=100)
                image_guidance = gr.Textbox(label="Strength of the reference", max_length=8, min_width=100)
                text_guidance = gr.Textbox(label="Strength of the prompt", max_length=8, min_width=100)
            with gr.Row():
                draw = gr.Button("Draw the story", variant="primary", elem_id="tell")
                stop = gr.Button("Stop")
    job = gr.State("")
    shown = gr.HTML(elem_id="story", elem_classes="dq-status")

    def on_draw(
        request: gr.Request, sent: str, lines: str | None, seeds: str | None, *given: Any
    ) -> Iterator[tuple[str, str]]:
        names = ("title", "captions", "steps", "image_guidance", "text_guidance")
        asked: dict[str, Any] = dict(zip(names, given, strict=True))
        asked["panel"] = [line.strip() for line in (lines or "").splitlines() if line.strip()]
        numbers = (seeds or "").replace(",", " ").split()
        asked |= {"seed": numbers[0]} if len(numbers) == 1 else {"panel_seed": numbers or None}
        yield from jobs.drawn(service, owner_of(request), StoryRequest, asked, sent, unread=unread(blocks, request))

    def on_stop(request: gr.Request, id: str) -> None:
        service.cancel(owner_of(request), id)

    def on_write(request: gr.Request, told: str, panels: int) -> str:
        return written(service, owner_of(request), told, panels)

    hidden: Any = {"api_visibility": "private"}
    given = [reference, panels, seed, title, captions, steps, image_guidance, text_guidance]
    draw.click(on_draw, given, [job, shown], concurrency_limit=64, show_progress="hidden", **hidden)
    stop.click(on_stop, job, None, concurrency_limit=None, **hidden)
    write.click(on_write, [idea, count], panels, concurrency_limit=8, **hidden)
    blocks.load(lambda: jobs.note(service, SMALL, ABOUT), None, about, **hidden)


def written(service: Service, owner: str, idea: str, count: int) -> str:
    """The panels of an idea, from the language model that the environment names, as lines."""
    from diptych.apps.story import write_panels

    endpoint = endpoint_of(None, None)
    if endpoint is None or not idea.strip():
        raise gr.Error("Say in a line what happens in the story.", print_exception=False)
    try:
        service.limit(owner, stores=False)
        return "\n".join(f"{panel.prompt} | {panel.caption}" for panel in write_panels(idea, int(count), endpoint))
    except UserError as error:
        raise gr.Error(escape(error), print_exception=False) from None
