"""Which image files are opened, what must be installed for some of them, and which files of a folder are images.

HEIC and HEIF, as phones write them, need the plug-in `pillow-heif` (the extra `heic`); AVIF needs Pillow 11.3.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

HEIF = (".heic", ".heif")
READ = (".png", ".webp", ".jpg", ".jpeg", ".jfif", ".jpe", ".gif", ".bmp", ".tif", ".tiff", ".avif", *HEIF)
NAMED = 5  # left-out files that a warning names
_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
log = logging.getLogger(__name__)


def open_header(data: bytes, label: str, formats: Sequence[str] | None = None) -> Image:
    """A file's bytes as Pillow opens them, not decoded yet. UserError, with what to do, if nothing here can.

    `formats` are Pillow's names of those to try; None: any. Other errors are those of Pillow's decoders.
    """
    from PIL import Image, UnidentifiedImageError

    kind = _of_iso(data)
    if kind == "HEIF" and (formats is None or kind in formats) and not _register_heif():
        raise UserError(f"{label}: HEIC images need a plug-in: pip install 'diptych[heic]'; or save it as JPEG or PNG")
    # Pillow knows no such name before the plug-in is there.
    tried = None if formats is None else [name for name in formats if name != "HEIF" or kind == name]
    try:
        return Image.open(io.BytesIO(data), formats=tried)
    except UnidentifiedImageError:
        if kind == "AVIF" and (formats is None or kind in formats):
            cure = "AVIF images need Pillow 11.3 or newer: pip install -U pillow; or save it as JPEG or PNG"
            raise UserError(f"{label}: cannot be opened; {cure}") from None
        known = "PNG, JPEG, WebP, GIF, TIFF, BMP, AVIF, HEIC" if formats is None else ", ".join(formats)
        raise UserError(f"{label}: not an image in a supported format ({known})") from None


def _of_iso(data: bytes) -> str:
    """HEIF or AVIF by the brands in a file's first box (ISO/IEC 14496-12); "" for any other file."""
    if data[4:8] != b"ftyp":
        return ""
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return "HEIF" if brands & _BRANDS else ""


@cache
def _register_heif() -> bool:
    """Whether Pillow opens HEIF here."""
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    register_heif_opener()
    return True


def pictures_in(folder: Path, beside: Sequence[str] = (), deep: bool = False) -> list[Path]:
    """The image files of a folder by their names, with `deep` those of its subfolders too.

    Whatever else is there is counted and named in a warning, but for hidden files and those that end in one of
    `beside`, such as captions.
    """
    there = sorted(folder.rglob("*") if deep else folder.iterdir())
    there = [p for p in there if not any(part[0] == "." for part in p.relative_to(folder).parts)]
    found = [p for p in there if p.suffix.lower() in READ and p.is_file()]
    left = [p for p in there if p not in set(found) and p.suffix.lower() not in beside and not (deep and p.is_dir())]
    if left:
        names = [f"{p.relative_to(folder)}{'/' * p.is_dir()}" for p in left]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        log.warning(
            "%s: %d of %d entries are left out, because their names are not those of images (%s): %s%s",
            folder,
            len(left),
            len(there),
            ", ".join(READ),
            ", ".join(names[:NAMED]),
            more,
        )
    return found
