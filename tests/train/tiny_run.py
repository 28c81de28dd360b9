"""A whole distillation in miniature: a random teacher folder, drawn pairs, a recipe; and, as a script, one training.

    python tests/train/tiny_run.py WORK OUT [stage.key=value …]

trains in WORK's world into OUT. Stock classes throughout; a step takes milliseconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # it is run as a script too
import tiny

WORDS = ["a", "the", "red", "blue", "cat", "robot", "in", "on", "desert", "snow", "grass"]
PANEL = 16


def make_teacher(folder: Path, guidance_embeds: bool = False) -> Path:
    """A complete FluxPipeline folder of random weights: 16 px panels of 2×2 tokens."""

    def parts() -> dict[str, Any]:
        tokenizers = tiny.word_tokenizers(WORDS, 8, clip_length=32)
        encoders = tiny.word_encoders(*tokenizers, width=16)
        images = tiny.vae(PANEL, 4, layers_per_block=1)
        transformer = make_transformer(guidance_embeds)
        return {"tokenizers": tokenizers, "encoders": encoders, "vae": images, "transformer": transformer}

    return tiny.flux_teacher(folder, parts)


def make_transformer(guidance_embeds: bool = False, channels: int = 16, seed: int = 1) -> Any:
    """A text-to-image FLUX of width 32, one double and two single blocks."""
    widths = {"joint_attention_dim": 24, "pooled_projection_dim": 16}
    return tiny.flux(channels, 2, seed, guidance_embeds=guidance_embeds, **widths)


def make_pairs(folder: Path, grids: int = 12, shard: int = 10, instruction: str = "") -> Any:
    """A published data set of both ordered pairs of each grid: a coloured square on two backgrounds."""
    from PIL import Image

    from diptych.data import records
    from diptych.data.images import image_cell
    from diptych.data.store import Dataset

    places = {"desert": (220, 190, 120), "snow": (240, 240, 250), "grass": (60, 160, 70)}
    rows = []
    for grid in range(grids):
        colour = ((37 * grid) % 256, (91 * grid) % 256, (53 * grid + 80) % 256)
        names = [list(places)[grid % 3], list(places)[(grid + 1) % 3]]
        panels = []
        for index, name in enumerate(names):
            panel = Image.new("RGB", (PANEL, PANEL), places[name])
            panel.paste(colour, (3 + 2 * index, 4, 10 + 2 * index, 12))
            panels.append(panel)
        for reference, target in ((0, 1), (1, 0)):
            rows.append(
                {
                    "conditioning": image_cell(panels[reference]),
                    "image": image_cell(panels[target]),
                    "caption": f"a cat in the {names[target]}",
                    "instruction": instruction,
                    "id": records.pair_id(f"g-{grid:06d}", reference, target),
                    "grid_id": f"g-{grid:06d}",
                    "reference_caption": f"a cat in the {names[reference]}",
                    "task": "subject",
                    "subject": "cat",
                    "reference_panel": reference,
                    "target_panel": target,
                    "seed": grid,
                    "similarity": 0.9,
                    "copy_distance": 0.3,
                    "seam": 1.0,
                    "kept": True,
                    "reason": "kept",
                    "judge": "test",
                    "evidence": "{}",
                }
            )
    data = Dataset(folder, records.schema(records.PAIR))
    for number, first in enumerate(range(0, len(rows), shard)):
        data.write_shard(number, rows[first : first + shard], "test")
    data.publish({"fingerprint": "test"})
    return data


DISTILL = {
    "steps": 12,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup": 3,
    "precision": "float32",
    "ema": 0.9,
    "checkpoint_every": 4,
    "validate_every": 4,
    "validation_pairs": 4,
    "sample_every": 0,
}


def make_recipe(teacher: Path, **distill: Any) -> Any:
    """A recipe for that teacher, quick to train."""
    from diptych.recipe.schema import Recipe

    values = {"name": "tiny", "teacher": str(teacher), "seed": 5, "device": "cpu", "threads": 1}
    return Recipe.model_validate({**values, "distill": {**DISTILL, **distill}})


def prepare(recipe: Any, pairs: Any, out: Path, *rest: Any) -> Any:
    """`prepare.prepare` on these pairs and what else the recipe names."""
    from diptych.train.prepare import Material, prepare

    return prepare(recipe, Material.open(recipe, pairs), out, *rest)


def main(work: str, out: str, *sets: str) -> None:
    """Trains in the world that `make_teacher` and `make_pairs` made in `work`."""
    import yaml

    from diptych.data.store import Dataset
    from diptych.student.runtime import parallel
    from diptych.train.distill import distill

    values = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in sets)}
    recipe = make_recipe(Path(work) / "teacher", **values)
    try:
        distill(
            recipe, Dataset(Path(work) / "pairs"), Path(out), lambda step, total, text: print(step, text, flush=True)
        )
    finally:
        parallel.leave()  # as `run.enter` does


if __name__ == "__main__":
    main(*sys.argv[1:])
