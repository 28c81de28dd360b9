"""The recipe's section `paint`: stage 2, the teacher draws grids."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from diptych.recipe.schema.base import Section


class Paint(Section):
    """Stage 2: the teacher draws grids."""

    steps: int = Field(default=20, ge=1, le=1000)
    """Sampling steps."""
    guidance: float = Field(default=3.5, ge=0)
    """Distilled guidance, an input of guidance-distilled teachers (FLUX.1-dev); the pocket teacher has none."""
    true_guidance: float = Field(default=2.0, ge=1)
    """Classifier-free guidance against the empty prompt; 1 is off, anything else doubles the cost."""
    images: int = Field(default=1, ge=1, le=1000)
    """Grids drawn of each prompt, each from its own noise."""
    batch_size: int = Field(default=16, ge=1)
    """Grids drawn at once. Part of the recipe: the last bits of a float sum depend on it."""
    format: Literal["png", "webp", "jpeg"] = "png"
    """What grids are kept as: `png` and `webp` lose nothing, `jpeg` (quality 95) is the quickest."""
    panel_size: int | None = Field(default=None, ge=16, le=4096)
    """Pixels of a panel's side; null is the teacher's own size, at most 512."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the teacher computes in. `auto` takes bfloat16 where it is faster, and is settled, like `device`, when a run
    is frozen."""
    memory: Literal["auto", "8", "12", "16", "24", "48", "80"] | None = None
    """Memory preset of the teacher, in GiB of the card, as `generate --memory` for a student: below 24 its weights are
    quantized, so grids change. `auto` takes the largest that fits, and is settled, like `device`, when a run is frozen;
    null leaves every part as loaded, on the device."""
    speed: Literal["exact", "fast", "fastest"] | None = None
    """`generate --speed` for a teacher: `exact` compiles, fuses and precomputes, to float rounding; `fast` and
    `fastest` also skip every second step, or all but every fourth. null is the stock pipeline."""

    @field_validator("memory", mode="before")
    @classmethod
    def _named(cls, memory: Any) -> Any:
        """`memory: 24` is a number in YAML, and a name here."""
        return str(memory) if isinstance(memory, int) and not isinstance(memory, bool) else memory
