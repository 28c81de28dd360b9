"""A student as a Gradio Space, in one file: a reference, a prompt and a seed give an image.

DIPTYCH_MODEL=pocket python app.py        # or owner/name; DIPTYCH_BASE is its teacher, if it needs one
"""

from __future__ import annotations

import os

import gradio as gr

from diptych import Student
from diptych.errors import UserError

MODEL = os.environ.get("DIPTYCH_MODEL") or "pocket"
student = Student.load(MODEL, os.environ.get("DIPTYCH_BASE") or None, progress_bar=False)


def draw(reference: str | None, prompt: str, seed: float):
    """Generates an image of the reference's subject that follows the prompt. Errors are shown on the page."""
    if reference is None:
        raise gr.Error("Add a reference image.")
    try:
        return student.generate(reference, prompt, seed=int(seed))
    except UserError as error:
        raise gr.Error(str(error)) from error


page = gr.Interface(
    draw,
    [
        gr.Image(label="Reference", type="filepath"),
        gr.Textbox(label="Prompt", placeholder="everything the new image shows"),
        gr.Number(label="Seed", value=0, precision=0, minimum=0),
    ],
    gr.Image(label="Image", type="pil", format="png"),
    title=f"diptych: {MODEL}",
    api_name="draw",
    flagging_mode="never",
)

if __name__ == "__main__":
    page.launch()
