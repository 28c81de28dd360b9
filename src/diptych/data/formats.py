"""Which image files are opened, what must be installed for some of them, and which files of a folder are images.

HEIC and HEIF, as phones write them, need the plug-in `pillow-heif` (the extra `heic`); AVIF needs Pillow 11.3.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UsageError, UserError, nearest

if TYPE_CHECKING:
    import numpy as np
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


# Any Pillow image as plain RGB: upright, 8-bit, in sRGB, transparency laid over a color. An embedded color profile is
# judged by what it does to values, never by its name: a profile that leaves sRGB values where they are is passed
# over, and every other one is applied, whether it describes RGB, gray, CMYK or Lab values.

WHITE = "white"
SAME = 2  # levels of 255 by which a profile may differ from sRGB and still be sRGB: rounding, and curves of few points
_ORIENTATION = 0x0112
_SPACES = {"L": ("GRAY", "RGB "), "RGB": ("RGB ",), "CMYK": ("CMYK",), "LAB": ("Lab ",)}  # mode → profiles that fit it
_PLAIN = {"1": "L", "P": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB"}
_DARK = 16  # what is nowhere brighter would be all but black on a scale of 255


def to_rgb(image: Image, background: str = WHITE) -> Image:
    """Any Pillow image as upright 8-bit sRGB; the very object if it is that already.

    EXIF rotation is applied; an embedded color profile is converted; 16-bit, 32-bit and float gray are scaled;
    transparency is laid over `background`, a color's name or `#rrggbb`. UsageError for no such color.
    """
    from PIL import Image, ImageOps

    under = colour(background)
    turned = image.getexif().get(_ORIENTATION, 1) != 1
    if image.mode == "RGB" and not turned and not {"transparency", "icc_profile"} & image.info.keys():
        return image
    profile = image.info.get("icc_profile")
    if turned:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        shown, alpha = _deep_gray(image, profile)
    else:
        if image.has_transparency_data:
            # Before the profile: a transparent color is named by the value that the file has for it.
            image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
            shown, alpha = image.convert(image.mode[:-1]), image.getchannel("A")
        else:
            shown, alpha = image.convert(_PLAIN.get(image.mode, image.mode)), None
        shown = _in_srgb(shown, profile)
    if alpha is not None:
        shown.putalpha(alpha)
        shown = Image.alpha_composite(Image.new("RGBA", shown.size, (*under, 255)), shown).convert("RGB")
    shown.info = {}  # what was applied must not be applied again
    return shown


def colour(name: str) -> tuple[int, int, int]:
    """A color's name or `#rrggbb` as (red, green, blue), 0 to 255. UsageError if it is neither."""
    from PIL import ImageColor

    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except (ValueError, AttributeError):
        hint = nearest(str(name), ImageColor.colormap)
        raise UsageError(f"unknown colour '{name}': a name such as white or grey, or #rrggbb{hint}") from None
    return red, green, blue


def _in_srgb(image: Image, profile: bytes | None) -> Image:
    """An opaque image as RGB, its values converted by `profile`. A broken profile, or one for other values than the
    image has, is ignored."""
    transform = _transform(image.mode, profile)
    if transform is None:
        return image.convert("RGB")
    mode, convert = transform
    return convert(image.convert(mode))


def _transform(mode: str, profile: bytes | None) -> tuple[str, Any] | None:
    """The mode that an image of `mode` needs, and the function that takes it to sRGB; None if its values are sRGB
    already, as far as anyone can tell."""
    try:
        from PIL import ImageCms

        if mode == "LAB":  # values that mean the same in every file
            found = ImageCms.createProfile("LAB")
        elif not profile:
            return None
        else:
            found = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
        if found.xcolor_space not in _SPACES.get(mode, ()):
            return None
        if mode == "L" and found.xcolor_space == "RGB ":
            mode = "RGB"
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(found), ImageCms.createProfile("sRGB"), mode, "RGB"
        )
        if mode in ("L", "RGB") and _leaves(transform, _probe(mode)):
            return None
    except (ImportError, OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None
    return mode, lambda image: ImageCms.applyTransform(image, transform)


@cache
def _probe(mode: str) -> Image:
    """All gray levels, or RGB values from everywhere in the cube."""
    import numpy as np
    from PIL import Image

    gray = np.arange(256, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(gray[None])
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    return Image.fromarray(np.concatenate([cube, np.stack([gray] * 3, axis=-1)[None]], axis=1))


def _leaves(transform: Any, probe: Image) -> bool:
    """Whether a transform leaves values where they are."""
    import numpy as np
    from PIL import ImageCms

    shown: Any = ImageCms.applyTransform(probe, transform)
    change = np.asarray(shown, dtype=np.int16) - np.asarray(probe.convert("RGB"), dtype=np.int16)
    return int(np.abs(change).max()) <= SAME


def _deep_gray(image: Image, profile: bytes | None) -> tuple[Image, Image | None]:
    """16-bit, 32-bit or float gray as RGB, through its profile before anything is rounded; and its transparency."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    key = image.info.get("transparency")
    alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
    scaled = (np.nan_to_num(values, posinf=np.inf) / _top(values, image.mode)).clip(0, 1) * 255
    if transform := _transform("L", profile):
        mode, convert = transform
        curve = np.asarray(convert(_probe("L").convert(mode)), dtype=np.float64)[0, :, 1]
        scaled = np.interp(scaled, np.arange(256), curve)
    return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB"), alpha


def _top(values: np.ndarray, mode: str) -> float:
    """The value that is white: files of these kinds do not say.

    Whole numbers: the end of the smallest usual range that holds them, 16 bits at least. Floats: 1, unless so many are
    larger that this is a picture on a scale of 255 (or 65535); a few that are larger are highlights, and white.
    """
    import numpy as np

    known = values[np.isfinite(values)]
    most = float(known.max(initial=0))
    if mode.startswith("I"):
        return next(top for top in (2.0**16 - 1, 2.0**24 - 1, 2.0**31 - 1) if most <= top)
    whole = most > _DARK and bool((known == known.round()).all())
    if most <= _DARK or not (whole or np.quantile(known, 0.99) > _DARK):
        return 1.0
    return next((top for top in (255.0, 65535.0) if most <= top), most)
