"""Image formats: how a file is opened, which files of a folder are images, and how any image becomes sRGB.

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
NAMED = 5  # ignored files that a warning lists
_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
log = logging.getLogger(__name__)


def open_header(data: bytes, label: str, formats: Sequence[str] | None = None) -> Image:
    """Opens an image without decoding it. UserError, with the remedy, if the format is not supported.

    `formats` are Pillow's names of the formats to try; None is all. Pillow's decoders may raise other errors.
    """
    from PIL import Image, UnidentifiedImageError

    kind = _of_iso(data)
    if kind == "HEIF" and (formats is None or kind in formats) and not _register_heif():
        cure = "HEIC images need a plug-in: pip install 'diptych[heic]'; or save it as JPEG or PNG"
        raise UserError("dependency_missing", f"{label}: {cure}")
    # Without the plug-in Pillow has no format of this name.
    tried = None if formats is None else [name for name in formats if name != "HEIF" or kind == name]
    try:
        return Image.open(io.BytesIO(data), formats=tried)
    except UnidentifiedImageError:
        if kind == "AVIF" and (formats is None or kind in formats):
            cure = "AVIF images need Pillow 11.3 or newer: pip install -U pillow; or save it as JPEG or PNG"
            raise UserError("dependency_missing", f"{label}: {cure}") from None
        known = "PNG, JPEG, WebP, GIF, TIFF, BMP, AVIF, HEIC" if formats is None else ", ".join(formats)
        raise UserError("image_unreadable", f"{label}: not an image in a supported format ({known})") from None


def _of_iso(data: bytes) -> str:
    """HEIF or AVIF, by the brands in the first box of a file (ISO/IEC 14496-12); "" for any other file."""
    if data[4:8] != b"ftyp":
        return ""
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return "HEIF" if brands & _BRANDS else ""


@cache
def _register_heif() -> bool:
    """Registers the HEIF plug-in. Returns whether it is installed."""
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    register_heif_opener()
    return True


def pictures_in(folder: Path, beside: Sequence[str] = (), deep: bool = False) -> list[Path]:
    """The image files of a folder, by their names. With `deep`, also those of its subfolders.

    A warning counts and lists all other entries, except hidden files and those with a suffix in `beside`, such as
    captions.
    """
    entries = sorted(folder.rglob("*") if deep else folder.iterdir())
    entries = [p for p in entries if not any(part[0] == "." for part in p.relative_to(folder).parts)]
    images = {p: None for p in entries if p.suffix.lower() in READ and p.is_file()}
    rest = [p for p in entries if p not in images and p.suffix.lower() not in beside and not (deep and p.is_dir())]
    if rest:
        names = ", ".join(f"{p.relative_to(folder)}{'/' * p.is_dir()}" for p in rest[:NAMED])
        more = f" and {len(rest) - NAMED} more" if len(rest) > NAMED else ""
        message = "%s: ignored %d of %d entries, whose names do not end like those of images (%s): %s%s"
        log.warning(message, folder, len(rest), len(entries), ", ".join(READ), names, more)
    return list(images)


# Any Pillow image as plain RGB: upright, 8-bit, in sRGB, transparency over a color. An embedded color profile is judged
# by its effect on values, never by its name. A profile that leaves sRGB values unchanged is ignored; every other one is
# applied, whether it describes RGB, gray, CMYK or Lab values.

WHITE = "white"
SAME = 2  # levels of 255 within which a profile counts as sRGB: rounding, and curves with few points
_ORIENTATION = 0x0112
_SPACES = {"L": ("GRAY", "RGB "), "RGB": ("RGB ",), "CMYK": ("CMYK",), "LAB": ("Lab ",)}  # mode → profiles that fit it
_PLAIN = {"1": "L", "P": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB"}
_DARK = 16  # an image with no larger value would be almost black on a scale of 255


def to_rgb(image: Image, background: str = WHITE) -> Image:
    """Any Pillow image as upright 8-bit sRGB; the same object if it already is.

    Applies EXIF rotation, converts an embedded color profile, scales 16-bit, 32-bit and float gray, and puts
    transparency over `background`, a color's name or `#rrggbb`. UsageError for an unknown color.
    """
    from PIL import Image, ImageOps

    under = color(background)
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
            # Before the profile, because the file gives the transparent color by its original value.
            image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
            shown, alpha = image.convert(image.mode[:-1]), image.getchannel("A")
        else:
            shown, alpha = image.convert(_PLAIN.get(image.mode, image.mode)), None
        shown = _in_srgb(shown, profile)
    if alpha is not None:
        shown.putalpha(alpha)
        shown = Image.alpha_composite(Image.new("RGBA", shown.size, (*under, 255)), shown).convert("RGB")
    shown.info = {}  # rotation and profile must not be applied again
    return shown


def color(name: str) -> tuple[int, int, int]:
    """A color's name or `#rrggbb` as (red, green, blue), 0 to 255. UsageError if it is neither."""
    from PIL import ImageColor

    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except (ValueError, AttributeError):
        hint = nearest(str(name), ImageColor.colormap)
        raise UsageError(
            "option_invalid", f"unknown color '{name}'; use a name such as white or gray, or #rrggbb{hint}"
        ) from None
    return red, green, blue


def _in_srgb(image: Image, profile: bytes | None) -> Image:
    """An opaque image as RGB, converted by `profile`. A broken profile, or one for another color space, is ignored."""
    transform = _transform(image.mode, profile)
    if transform is None:
        return image.convert("RGB")
    mode, convert = transform
    return convert(image.convert(mode))


def _transform(mode: str, profile: bytes | None) -> tuple[str, Any] | None:
    """The mode that an image of `mode` needs, and the function that converts it to sRGB; None if it counts as sRGB."""
    try:
        from PIL import ImageCms

        if mode == "LAB":  # its values need no profile
            source = ImageCms.createProfile("LAB")
        elif not profile:
            return None
        else:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
        if source.xcolor_space not in _SPACES.get(mode, ()):
            return None
        if mode == "L" and source.xcolor_space == "RGB ":
            mode = "RGB"
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(ImageCms.ImageCmsProfile(source), srgb, mode, "RGB")
        if mode in ("L", "RGB") and _keeps(transform, _probe(mode)):
            return None
    except (ImportError, OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None
    return mode, lambda image: ImageCms.applyTransform(image, transform)


@cache
def _probe(mode: str) -> Image:
    """An image of all gray levels, or of RGB values across the whole cube."""
    import numpy as np
    from PIL import Image

    gray = np.arange(256, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(gray[None])
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    return Image.fromarray(np.concatenate([cube, np.stack([gray] * 3, axis=-1)[None]], axis=1))


def _keeps(transform: Any, probe: Image) -> bool:
    """Whether a transform leaves values unchanged, within `SAME` levels."""
    import numpy as np
    from PIL import ImageCms

    shown: Any = ImageCms.applyTransform(probe, transform)
    change = np.asarray(shown, dtype=np.int16) - np.asarray(probe.convert("RGB"), dtype=np.int16)
    return int(np.abs(change).max()) <= SAME


def _deep_gray(image: Image, profile: bytes | None) -> tuple[Image, Image | None]:
    """16-bit, 32-bit or float gray as RGB, converted by its profile before rounding; and its transparency."""
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
    """The value of white, which files of these kinds do not state.

    Integers: the end of the smallest usual range that contains them, at least 16 bits. Floats: 1, unless more than 1 %
    are so large that the scale must be 255 (or 65535); a few larger values are highlights.
    """
    import numpy as np

    known = values[np.isfinite(values)]
    largest = float(known.max(initial=0))
    if mode.startswith("I"):
        return next(top for top in (2.0**16 - 1, 2.0**24 - 1, 2.0**31 - 1) if largest <= top)
    whole = largest > _DARK and bool((known == known.round()).all())
    if largest <= _DARK or not (whole or np.quantile(known, 0.99) > _DARK):
        return 1.0
    return next((top for top in (255.0, 65535.0) if largest <= top), largest)
