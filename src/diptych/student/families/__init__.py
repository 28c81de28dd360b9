"""What differs between the teachers that diptych opens: a file for each family of transformers, and tables."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from diptych.errors import UsageError, nearest

if TYPE_CHECKING:
    from pathlib import Path

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


def family_in(folder: Path) -> Family:
    """The family of a pipeline's folder, by the class of its transformer. UsageError if there is none."""
    from diptych.utils.opening import INDEX, class_of, read_file

    named = read_file(folder / INDEX).get("transformer")
    name = named[1] if isinstance(named, list) and len(named) == 2 else None
    name = name or read_file(folder / "transformer" / "config.json").get("_class_name")
    kind = class_of(folder)
    family = family_of(str(name or kind or "model without a transformer"), f"{folder}: ")
    if family.name != "flux1" and kind not in family.pipelines:
        raise UsageError(
            "model_unsupported",
            f"{folder} is a {kind} with a {name}, and no student can be made from it. Use a "
            f"{' or '.join(family.pipelines)}.",
        )
    return family


def is_flux1(folder: Path) -> bool:
    """Whether the pipeline in a folder is of FLUX.1's family. False for those without a family."""
    try:
        return family_in(folder).name == "flux1"
    except UsageError:
        return False


def family_of(name: str, where: str = "") -> Family:
    """The family of a transformer or pipeline by its class name. UsageError, which begins with `where`, if there is
    none."""
    for family in families().values():
        if name in (family.transformer, family.editor, *family.pipelines):
            return family
    known = [family.transformer for family in families().values()]
    raise UsageError(
        "model_unsupported",
        f"{where}no student can be made from a {name}; transformers with a family: {', '.join(known)}"
        f"{nearest(name, known)}",
    )
