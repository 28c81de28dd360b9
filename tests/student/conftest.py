"""A whole tiny student with text encoders, made here, and the fixture of the released layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny

GOLDEN = Path(__file__).parents[1] / "fixtures" / "release_golden"
WORDS = ["a", "cat", "dog", "on", "the", "beach", "moon", "red", "at", "night", "in", "snow"]
LENGTH = 12  # text tokens
PANEL = 16  # pixels; VAE factor 4, so 2×2 tokens a panel
TINY: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}


def tiny_transformer(**changes: Any):
    return tiny.flux(seed=5, **{**TINY, **changes}).eval()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete FluxPipeline folder with random weights, and its `words.json`."""

    def parts() -> dict[str, Any]:
        tokenizers = tiny.word_tokenizers(WORDS, LENGTH)
        images = tiny.vae(PANEL, 4)
        encoders = tiny.word_encoders(*tokenizers, width=20)
        return {"tokenizers": tokenizers, "encoders": encoders, "vae": images, "transformer": tiny_transformer()}

    folder = tiny.flux_teacher(tmp_path_factory.mktemp("models") / "teacher", parts, seed=1, shift=1.0)
    (folder / "words.json").write_text(json.dumps(WORDS))
    return folder


@pytest.fixture(scope="session")
def student_folder(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only a student's `transformer/`: the teacher widened, its condition columns random."""
    return tiny.widened(teacher, tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="session")
def pipe(student_folder: Path, teacher: Path):
    from diptych import student

    loaded = student.load(student_folder, teacher, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def pictures() -> list[Image.Image]:
    import numpy as np

    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (PANEL, PANEL, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.fixture
def golden() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(GOLDEN / "golden.safetensors")
