"""Folders whose weights are saved as a variant: `diffusion_pytorch_model.fp16.safetensors` in the place of
`diffusion_pytorch_model.safetensors`, in one file or in shards."""

from __future__ import annotations

import re
from pathlib import Path

from diptych.errors import UserError

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # diffusers' name and transformers'


def variant_of(folder: Path, name: str) -> str | None:
    """The variant of the weights `name` that a folder has (`variant=` of diffusers); None where it has the plain file
    or nothing. UserError if it has several."""
    if (folder / name).is_file() or (folder / f"{name}.index.json").is_file():
        return None
    stem, _, ending = name.rpartition(".")
    names = re.compile(rf"{re.escape(stem)}\.(?:([^.]+)\.{ending}|{ending}\.index\.([^.]+)\.json)")
    matches = (names.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    # A shard's name has its number in the place of the variant, or behind it.
    found = sorted({m[1] or m[2] for m in matches if m and not re.search(r"-\d+-of-\d+$", m[1] or "")})
    if len(found) > 1:
        raise UserError(f"{folder} holds its weights as {', '.join(found)}; keep one of them, or a plain {name}")
    return found[0] if found else None


def pipeline_variant(folder: Path) -> str | None:
    """The variant to open a whole pipeline's folder with (`variant=` of diffusers); None for plain files. UserError if
    its parts have several."""
    parts = sorted(part for part in folder.iterdir() if part.is_dir()) if folder.is_dir() else []
    found = {v for part in parts for name in WEIGHTS if (v := variant_of(part, name))}
    if len(found) > 1:
        raise UserError(
            f"the parts of {folder} are saved as {', '.join(sorted(found))}; save all of them as one variant"
        )
    return next(iter(found), None)


def variant_names(name: str, variant: str) -> tuple[str, str]:
    """A variant's file and index, as diffusers and transformers write them."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}", f"{name}.index.{variant}.json"
