"""Section `paint` of a recipe: stage 2, the teacher generates grids."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from diptych.recipe.schema.base import Section


class Paint(Section):
    """Stage 2: the teacher generates grids."""

    steps: int = Field(default=20, ge=1, le=1000)
    """Sampling steps of the teacher."""
    guidance: float = Field(default=3.5, ge=0)
    """Distilled guidance scale, an input of guidance-distilled teachers (FLUX.1-dev). The pocket teacher has none."""
    true_guidance: float = Field(default=2.0, ge=1)
    """Classifier-free guidance scale against the empty prompt. 1 turns it off; any other value doubles the cost."""
    images: int = Field(default=1, ge=1, le=1000)
    """Grids to generate for each prompt, each from different noise."""
    batch_size: int = Field(default=16, ge=1)
    """Grids to generate at once. Results depend on it in the last bits, so it is part of the recipe."""
    format: Literal["png", "webp", "jpeg"] = "png"
    """File format of stored grids. `png` and `webp` are lossless; `jpeg` (quality 95) is the fastest to write."""
    panel_size: int | None = Field(default=None, ge=16, le=4096)
    """Side of a panel in pixels. null is the teacher's native size, at most 512."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the teacher. `auto` is bfloat16 where that is faster; it is resolved when a run is frozen."""
    memory: Literal["auto", "8", "12", "16", "24", "48", "80"] | None = None
    """Memory preset of the teacher, in GiB of GPU memory, as for `generate --memory`. Presets below 24 quantize the
    weights, which changes the grids. `auto` is the largest preset that fits; it is resolved when a run is frozen. null
    leaves every component as loaded, on the device."""
    speed: Literal["exact", "fast", "fastest"] | None = None
    """Speed preset of the teacher, as for `generate --speed`. `exact` compiles, fuses and precomputes, with the same
    result up to rounding. `fast` also skips every second step, `fastest` all but every fourth. null is the plain
    pipeline."""

    @field_validator("memory", mode="before")
    @classmethod
    def _named(cls, memory: Any) -> Any:
        """`memory: 24` is a number in YAML, and a name here."""
        return str(memory) if isinstance(memory, int) and not isinstance(memory, bool) else memory
