"""The pictures of the documentation, drawn by the pocket world and its models: `drawn(folder)`.

Drawn again only when the weights or this file have changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SCALE, GAP = 2, 8


def sheet(rows: Sequence[Sequence[Image.Image]], apart: int = 0) -> Image.Image:
    """Pictures in rows, enlarged; the first `apart` columns stand a little apart."""
    heights = [max(image.height for image in row) * SCALE + GAP for row in rows]
    widths = [sum(image.width * SCALE + GAP for image in row) + 2 * GAP * bool(apart) for row in rows]
    picture = Image.new("RGB", (max(widths) - GAP, sum(heights) - GAP), "white")
    for row, top in zip(rows, np.cumsum([0, *heights[:-1]]), strict=True):
        left = 0
        for column, image in enumerate(row):
            left += 2 * GAP * (bool(apart) and column == apart)
            big = image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.BICUBIC)
            picture.paste(big, (left, int(top)))
            left += big.width + GAP
    return picture


def world() -> Image.Image:
    """Renders: each row one subject in six scenes."""
    from diptych.pocket import world as pocket
    from diptych.pocket.render import render

    rng = np.random.default_rng(5)
    rows = []
    for kind in ("cat", "robot", "car"):
        identity = pocket.sample_identity(rng, kind=kind)
        rows.append([Image.fromarray(render(identity, pocket.sample_scene(rng))) for _ in range(6)])
    return sheet(rows)


def lights() -> Image.Image:
    """Renders: the same scene under six lights."""
    from diptych.pocket import world as pocket
    from diptych.pocket.render import render

    rng = np.random.default_rng(8)
    rows = []
    for kind in ("mushroom", "house"):
        identity, scene = pocket.sample_identity(rng, kind=kind), replace(pocket.sample_scene(rng), weather="clear")
        scenes = [scene, *(pocket.relight(rng, scene) for _ in range(5))]
        rows.append([Image.fromarray(render(identity, scene)) for scene in scenes])
    return sheet(rows)


def grids() -> Image.Image:
    """The teacher's grids, from the grammar's prompts."""
    import torch

    from diptych.pocket import captions
    from diptych.pocket import world as pocket
    from diptych.stages.paint import generate, open_teacher
    from diptych.utils.models import resolve

    rng = np.random.default_rng(2)
    prompts: list[str] = []
    while len(prompts) < 9:
        kind = str(rng.choice(pocket.TRAIN_KINDS))
        prompt = captions.grid(kind, pocket.sample_scene(rng), pocket.sample_scene(rng), rng)[0]
        if captions.count_words(prompt) <= captions.LONGEST:
            prompts.append(prompt)
    teacher = open_teacher(resolve("pocket", "teacher"), torch.float32)
    options: dict[str, Any] = {"height": 64, "width": 128, "num_inference_steps": 16, "max_sequence_length": 32}
    drawn = generate(
        teacher, prompts, list(range(9)), true_cfg_scale=3.0, negative_prompt=[""] * len(prompts), **options
    )
    images = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in drawn]
    return sheet([images[n : n + 3] for n in range(0, 9, 3)])


def student() -> Image.Image:
    """References, and what the student draws of each for four prompts."""
    places = ("on the beach, bright white light from above", "jumping in a meadow", "in a library", "on the moon")
    return _drawn(("cat", "fish", "house"), [f"a {{}} {place}" for place in places], [{}])


def guidance() -> Image.Image:
    """One prompt at text guidance 1, 2, 3 and 5."""
    options = [{"text_guidance": scale} for scale in (1.0, 2.0, 3.0, 5.0)]
    return _drawn(("robot", "bird"), ["a {} in a forest, soft white light from the left"], options)


def _drawn(kinds: Sequence[str], prompts: Sequence[str], options: Sequence[dict[str, Any]]) -> Image.Image:
    from diptych import Student
    from diptych.utils.paths import packaged

    pocket = Student.load("pocket")
    pocket.pipeline.set_progress_bar_config(disable=True)
    rows = []
    for kind in kinds:
        path = packaged("examples/references") / f"{kind}.png"
        asked = [prompt.format(kind) for prompt in prompts]
        drawn = [image for option in options for image in pocket.generate(path, asked, seed=0, **option)]
        rows.append([Image.open(path).convert("RGB"), *drawn])
    return sheet(rows, apart=1)


PICTURES: dict[str, Callable[[], Image.Image]] = {
    function.__name__: function for function in (world, lights, grids, student, guidance)
}


def drawn(folder: Path) -> dict[str, Path]:
    """Every picture's file, by name; those in `folder` that are still true are not drawn again."""
    from diptych.utils.paths import packaged

    weights = sorted(packaged("pocket/weights").rglob("*.safetensors"))
    digest = hashlib.sha256(b"".join([Path(__file__).read_bytes(), *(path.read_bytes() for path in weights)]))
    folder = folder / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        if not (path := folder / f"{name}.png").exists():
            draw().save(path, optimize=True)
    return {name: folder / f"{name}.png" for name in PICTURES}
