"""The page for those who come from the authors' generate.py: every flag of theirs is there, each of ours exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from diptych.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "from-release.md"
# github primecai/diffusion-self-distillation, generate.py at commit 1f95769
THEIRS = [
    *("--model_path", "--lora_path", "--image_path", "--text", "--output_path", "--steps"),
    *("--guidance", "--i_guidance", "--t_guidance", "--disable_gemini_prompt"),
    *("--model_offload", "--sequential_offload"),
]


def test_every_flag_of_theirs_has_a_row_and_every_one_of_ours_exists() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text("utf8").splitlines() if line.startswith("| ")]
    theirs, ours = (re.findall(r"--[a-z_-]+", " ".join(row[column] for row in rows)) for column in (0, 1))
    assert sorted(theirs) == sorted(THEIRS)
    command: Any = typer.main.get_command(app.app)
    known = {option for parameter in command.commands["generate"].params for option in parameter.opts}
    assert set(ours) <= known and len(set(ours)) > 10
