"""Images in and out. In: whatever people have, refused before it can hurt. Out: PNG that says what made it.

A file is opened only after its size in bytes and in pixels is known to be sane, so a decompression bomb is refused
before it is decoded. What comes back is always plain RGB, upright, alpha laid over white.
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data.store import write_atomic
from diptych.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 200 * 1024 * 1024
MAX_PIXELS = 64_000_000  # a 100-megapixel bomb is out, every camera in use is in
PROVENANCE = "diptych"  # the PNG text chunk that holds the JSON
READABLE = "parameters"  # and the one that image viewers of this field show


def open_image(
    source: str | Path | bytes | dict[str, Any],
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Image:
    """An image file, its bytes, or a row's `{bytes, path}` cell as upright RGB; any mode, alpha over white.

    Raises UserError, one line that says what is wrong with which image: missing, empty, not an image, cut short,
    larger than `max_bytes` or `max_pixels`. `name` is what the message calls bytes.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(source, dict):
        name = name or source.get("path")
        held = source.get("bytes")
        place: str | Path | bytes = held if held is not None else str(source.get("path") or "")
    else:
        place = source
    label = name or ("image" if isinstance(place, bytes) else str(place))
    data = place if isinstance(place, bytes) else _read(Path(place), max_bytes)
    if not data:
        raise UserError(f"{label}: the file is empty")
    if len(data) > max_bytes:
        raise UserError(f"{label}: {len(data) / 2**20:.0f} MiB is over the limit of {max_bytes / 2**20:.0f} MiB")
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb warning comes at another limit; ours is checked before anything is decoded.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(
                    f"{label}: {width}×{height} is {width * height / 1e6:.0f} megapixels, "
                    f"over the limit of {max_pixels / 1e6:.0f}; make it smaller first"
                )
            image.load()
            image = ImageOps.exif_transpose(image)
            return _rgb(image)
    except UnidentifiedImageError:
        raise UserError(f"{label}: not an image, or of a kind that is not known here") from None
    except Image.DecompressionBombError:
        raise UserError(f"{label}: far more pixels than the limit of {max_pixels / 1e6:.0f} megapixels") from None
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, MemoryError) as error:
        # Pillow's decoders raise all of these on broken files.
        raise UserError(f"{label}: the image is broken or cut short ({_short(error)})") from error


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise UserError(f"{path}: {size / 2**20:.0f} MiB is over the limit of {max_bytes / 2**20:.0f} MiB")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not an image") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _rgb(image: Image) -> Image:
    """Any Pillow mode as 8-bit RGB. 16-bit and float grey are scaled, not clipped; transparency is laid over white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        image = _grey_to_8_bit(image)
    if image.mode in ("P", "LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bit(image: Image) -> Image:
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode.startswith("I"):
        # "I" is also how Pillow gives some 16-bit files; only values past 16 bits make it a 32-bit one.
        top = 65535.0 if values.max(initial=0) <= 65535 else float(2**31 - 1)
        scaled = values / top
    else:
        scaled = values if values.max(initial=0) <= 1 else values / 255
    return Image.fromarray((scaled.clip(0, 1) * 255).round().astype(np.uint8))


def encode_png(image: Image, provenance: dict[str, Any] | None = None) -> bytes:
    """An image as PNG, the same bytes for the same picture and provenance.

    `provenance` goes into the text chunk `diptych` as JSON with sorted keys, and into `parameters` as a line to read.
    """
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    if provenance is not None:
        dumped = json.dumps(provenance, sort_keys=True, ensure_ascii=False)
        # tEXt holds latin-1 only; iTXt holds any language.
        for key, value in ((PROVENANCE, dumped), (READABLE, _readable(provenance))):
            text.add_text(key, value) if value.isascii() else text.add_itxt(key, value)
    out = io.BytesIO()
    # `info` of an opened file (profiles, dpi, old text) must not leak into ours.
    plain = image.copy()
    plain.info = {}
    plain.save(out, "PNG", pnginfo=text, compress_level=6)
    return out.getvalue()


def _readable(provenance: dict[str, Any]) -> str:
    rest = ", ".join(
        f"{key}: {value}" for key, value in provenance.items() if key != "prompt" and not isinstance(value, dict | list)
    )
    prompt = str(provenance.get("prompt", ""))
    return "\n".join(line for line in (prompt, rest) if line)


def image_cell(image: Image, path: str | None = None) -> dict[str, Any]:
    """An image as a row's cell: `{"bytes": PNG, "path": path}`."""
    return {"bytes": encode_png(image), "path": path}


def save_image(image: Image, path: str | Path, provenance: dict[str, Any] | None = None) -> Path:
    """Writes a PNG with its provenance, whole or not at all; makes the folder. UserError if it cannot."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: images are written as PNG; end the name in .png")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made ({error.strerror or error})") from error
    write_atomic(path, encode_png(image, provenance))
    return path


def read_provenance(path: str | Path) -> dict[str, Any] | None:
    """What made a PNG, or None if it does not say. UserError if it is no image."""
    from PIL import Image, UnidentifiedImageError

    data = _read(Path(path), MAX_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = Image.open(io.BytesIO(data)).info.get(PROVENANCE)
        return None if text is None else json.loads(text)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise UserError(f"{path}: not a readable image ({_short(error)})") from error
    except ValueError as error:
        raise UserError(f"{path}: its provenance is not valid JSON") from error


def _short(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
