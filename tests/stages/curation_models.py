"""A tiny teacher and a tiny judge of random weights, and, as a script (RECIPE OUT), a run as far as its pairs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # it is run as a script too
import tiny

PANEL = 64


def make_teacher(folder: Path) -> Path:
    """A complete FluxPipeline folder that reads the pocket vocabulary."""
    return tiny.pocket_teacher(folder, PANEL)


def make_half(teacher: Path, folder: Path) -> Path:
    """The same teacher with float16 files."""
    import torch
    from diffusers import FluxPipeline

    FluxPipeline.from_pretrained(teacher, torch_dtype=torch.float16).save_pretrained(folder)
    return folder


def make_judge(folder: Path) -> Path:
    """A random stock ResNet with its image processor."""
    return tiny.resnet(folder)


def make_classifier(folder: Path) -> Path:
    """A random stock ResNet that tells three labels apart."""
    return tiny.resnet(folder, ["normal", "nsfw", "text"])


def recipe_text(teacher: Path, judge: Path) -> str:
    """Twelve grids in three shards, batches that do not divide a shard; thresholds that random panels pass."""
    return f"""
name: tiny
seed: 3
teacher: {teacher}
device: cpu
threads: 1
write: {{count: 12, shard_size: 4}}
paint: {{steps: 2, batch_size: 3}}
curate: {{judge: {judge}, batch_size: 3, thresholds: {{same: -1, near_copy: 0, seam: -1}}}}
"""


if __name__ == "__main__":
    from diptych.recipe import load
    from diptych.run.runner import run
    from diptych.utils.console import Display

    run(load(sys.argv[1]), sys.argv[2], ("write", "paint", "curate"), Display(quiet=True))
