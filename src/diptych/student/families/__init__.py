"""What differs between the teachers that diptych opens: a file for each family of transformers, and tables."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from diptych.errors import UsageError, nearest

if TYPE_CHECKING:
    from diptych.student.families.base import Family


@cache
def families() -> dict[str, Family]:
    """Every family by name."""
    from diptych.student.families.flux1 import FLUX1
    from diptych.student.families.flux2 import Flux2
    from diptych.student.families.qwen_image import QwenImage
    from diptych.student.families.sd3 import StableDiffusion3
    from diptych.student.families.z_image import ZImage

    return {family.name: family for family in (FLUX1, Flux2(), QwenImage(), StableDiffusion3(), ZImage())}


def family_of(name: str) -> Family:
    """The family of a transformer or pipeline by its class name. UsageError if there is none."""
    for family in families().values():
        if name in (family.transformer, family.editor, *family.pipelines):
            return family
    known = [family.transformer for family in families().values()]
    raise UsageError(
        "model_unsupported",
        f"no student can be made from a {name}; transformers with a family: {', '.join(known)}{nearest(name, known)}",
    )
