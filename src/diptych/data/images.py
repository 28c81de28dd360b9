"""Images in and out: any image file becomes RGB, and results are saved with their provenance inside.

A file is decoded only after its size in bytes and in pixels has been checked, so a decompression bomb does no harm. The
result is always plain RGB, upright, in sRGB, with alpha over white or another color; of an animation it is the first
frame. Images are written as PNG, lossless WebP or JPEG.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data import seal
from diptych.data.formats import WHITE, open_header, to_rgb
from diptych.errors import UsageError, UserError, describe
from diptych.utils import documents
from diptych.utils.documents import parse_json
from diptych.utils.io import sha256, write_atomic
from diptych.utils.paths import here_or_packaged

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 200 * 1024 * 1024
MAX_PIXELS = 64_000_000  # excludes a 100-megapixel bomb and no camera in common use
PROGRAMS = ("EPS", "WMF")  # opening them runs a program: Pillow passes EPS to Ghostscript
PROVENANCE = "diptych"  # the PNG text chunk that holds the JSON
READABLE = "parameters"  # the PNG text chunk that image viewers of this field show
KINDS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}  # formats that are written, by suffix
_SAVING: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 6},
    "WEBP": {"lossless": True, "quality": 80, "method": 4},  # with `lossless`, `quality` is effort
    "JPEG": {"quality": 95, "subsampling": 0},
}
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_ASCII = b"ASCII\0\0\0"  # EXIF's marker of the text's encoding
_MAX_JPEG_EXIF = 65_000  # bytes; a JPEG segment holds 64 KiB


def open_image(
    source: str | Path | bytes | dict[str, Any] | None,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
    background: str = WHITE,
    formats: Sequence[str] | None = None,
) -> Image:
    """Opens an image file, its bytes, or a row's `{bytes, path}` cell as upright RGB, alpha over `background`.

    Args:
        source: the image.
        max_bytes: limit of the file's size.
        max_pixels: limit of width times height.
        name: what messages call an image that is given as bytes.
        background: a color's name or `#rrggbb`.
        formats: Pillow's names of the allowed formats; None is all.

    Raises UserError if the image is missing, empty, damaged, too large, of another format, or a program that would
    generate one.
    """
    from PIL import Image

    place = source.get("bytes") if isinstance(source, dict) else source
    if isinstance(source, dict):  # a row is data, so its path is only a name
        name = name or source.get("path")
    if place is None:
        raise UserError("image_missing", f"{name or 'image'}: no image")
    label, data = name or _label(place), _bytes(place, max_bytes)
    if not data:
        raise UserError("image_unreadable", f"{label}: the file is empty")
    if len(data) > max_bytes:
        raise _too_large(label, len(data), max_bytes)
    try:
        with warnings.catch_warnings():
            # Pillow warns of bombs at another limit; ours is checked before decoding.
            warnings.simplefilter("ignore")
            image = open_header(data, label, formats)
            _check_pixels(label, image, max_pixels)
            if image.format in PROGRAMS:
                raise UserError("image_unreadable", f"{label}: {image.format} files are programs; save it as PNG")
            image.load()
            return to_rgb(image, background)
    except Image.DecompressionBombError:
        limit = f"{max_pixels / 1e6:.0f} megapixels"
        raise UserError("image_too_large", f"{label}: far more pixels than the limit of {limit}") from None
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise any exception on damaged files
        raise UserError("image_unreadable", f"{label}: damaged or incomplete ({describe(error)})") from error


def _too_large(label: str, size: int, limit: int) -> UserError:
    return UserError("image_too_large", f"{label}: {documents.size(size)} is over the limit of {documents.size(limit)}")


def _check_pixels(label: str, image: Image, limit: int) -> None:
    width, height = image.size
    if width * height > limit:
        raise UserError(
            "image_too_large",
            f"{label}: {width}×{height} is {width * height / 1e6:.0f} megapixels, over the limit of {limit / 1e6:.0f}; "
            "scale it down",
        )


def _bytes(source: str | Path | bytes, max_bytes: int = MAX_BYTES) -> bytes:
    if isinstance(source, bytes):
        return source
    path = here_or_packaged(source)
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise _too_large(str(path), size, max_bytes)
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)  # a device has no size and no end
        if len(data) > max_bytes:
            raise _too_large(str(path), len(data), max_bytes)
        return data
    except FileNotFoundError:
        raise UserError("image_not_found", f"Image not found: {path}. Check the path.") from None
    except IsADirectoryError:
        raise UserError("path_wrong_kind", f"{path}: a folder, not an image file") from None
    except OSError as error:
        raise UserError("path_unreadable", f"{path}: cannot be read ({error.strerror or error})") from error


def _label(source: str | Path | bytes) -> str:
    return "image" if isinstance(source, bytes) else str(source)


def check_image(path: str | Path) -> str:
    """sha256 of an image file. UserError if its size or header shows that it cannot be opened. Decodes nothing."""
    from PIL import Image

    data = _bytes(path)
    if not data:
        raise UserError("image_unreadable", f"{path}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_pixels(str(path), open_header(data, str(path)), MAX_PIXELS)
    except UserError:
        raise
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError("image_unreadable", f"{path}: not a readable image ({describe(error)})") from error
    return sha256(data)


def encode_png(image: Image, provenance: dict[str, Any] | None = None) -> bytes:
    """`encode` as PNG."""
    return encode(image, "PNG", provenance)


def encode(image: Image, kind: str, provenance: dict[Any, Any] | None = None) -> bytes:
    """An image as PNG, WEBP (lossless) or JPEG. Equal images and provenance give equal bytes.

    `provenance` is stored as JSON with sorted keys, with a seal (`data.seal`). A PNG has it in the text chunk
    `diptych`, beside a readable line in `parameters`; the others in the EXIF UserComment, as `{"diptych": …}` in ASCII.
    UserError if it is too long for a JPEG.
    """
    options = dict(_SAVING[kind])
    if provenance is not None:
        shown = seal.coded_hash(encode(image, kind)) if kind == "JPEG" else seal.pixels_hash(image)
        provenance = seal.sealed(provenance, shown)
        options |= {"pnginfo": _png_text(provenance)} if kind == "PNG" else {"exif": _exif(provenance)}
        if kind == "JPEG" and len(options["exif"]) > _MAX_JPEG_EXIF:
            raise UserError(
                "image_unwritable", "the provenance, with its prompt, is too long for a JPEG; save as PNG or WebP"
            )
    out = io.BytesIO()
    # `info` of an opened file (profiles, dpi, old text) must not get into ours.
    plain = image.copy()
    plain.info = {}
    plain.save(out, kind, **options)
    return out.getvalue()


def _png_text(provenance: dict[str, Any]) -> Any:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    dumped = json.dumps(provenance, sort_keys=True, ensure_ascii=False)
    # tEXt holds latin-1 only; iTXt holds any language.
    for key, value in ((PROVENANCE, dumped), (READABLE, _readable(provenance))):
        text.add_text(key, value) if value.isascii() else text.add_itxt(key, value)
    return text


def _exif(provenance: dict[str, Any]) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + json.dumps({PROVENANCE: provenance}, sort_keys=True).encode()
    return exif.tobytes()


def _readable(provenance: dict[str, Any]) -> str:
    rest = ", ".join(
        f"{key}: {value}" for key, value in provenance.items() if key != "prompt" and not isinstance(value, dict | list)
    )
    prompt = str(provenance.get("prompt", ""))
    return "\n".join(line for line in (prompt, rest) if line)


def image_cell(image: Image, path: str | None = None, kind: str = "PNG") -> dict[str, Any]:
    """An image as a row's cell: `{"bytes": …, "path": path}`. PNG and WEBP are lossless; JPEG is the fastest."""
    return {"bytes": encode(image, kind), "path": path}


def kind_of(path: str | Path) -> str:
    """PNG, WEBP or JPEG, by a file's suffix. UsageError for any other."""
    suffix = Path(path).suffix.lower()
    if suffix not in KINDS:
        raise UsageError(
            "file_format_unknown", f"{path}: images are saved as PNG, WebP or JPEG; use .png, .webp or .jpg"
        )
    return KINDS[suffix]


def save_image(image: Image, path: str | Path, provenance: dict[Any, Any] | None = None) -> Path:
    """Writes a PNG, WebP or JPEG with its provenance, atomically, and creates its folder. UserError if it cannot."""
    path = Path(path)
    kind = kind_of(path)
    if path.is_dir():
        raise UserError("path_wrong_kind", f"{path}: a folder; pass a file name")
    write_atomic(path, encode(image, kind, provenance))
    return path


def read_provenance(source: str | Path | bytes) -> dict[str, Any] | None:
    """Provenance of a PNG, WebP or JPEG (a file, or its bytes); None if it has none. UserError if it is not an
    image."""
    text = _read_text(_label(source), _bytes(source))
    return None if text is None else {key: value for key, value in text.items() if key != seal.KEY}


def broken_seal(source: str | Path | bytes) -> list[str] | None:
    """The parts of an image that changed since it was written: `pixels` (in a JPEG `image data`), `text`, a chunk of
    the file. None if it has no seal. Bytes after the end of the image are ignored.

    UserError if it is not an image, or can no longer be decoded.
    """
    data = _bytes(source)
    text = _read_text(_label(source), data)
    if text is None or not isinstance(hashes := text.get(seal.KEY), dict):
        return None
    broken = [] if seal.text_hash(text) == hashes.get("text") else ["text"]
    if data.startswith(b"\xff\xd8"):
        part, shown = "image data", seal.coded_hash(data)
    else:
        part, shown = "pixels", seal.pixels_hash(open_image(data, name=_label(source)))
    if shown != hashes.get("picture"):
        broken.append(part)
    if not broken and data.startswith(b"\x89PNG") and (chunk := seal.broken_chunk(data)):
        broken.append(f"{chunk} chunk")
    return broken


def _read_text(path: str, data: bytes) -> dict[str, Any] | None:
    """The provenance in a file's bytes, with its seal; None if there is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            text = image.info.get(PROVENANCE)
            comment = None if text is not None else image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        chunk = seal.broken_chunk(data) if data.startswith(b"\x89PNG") else None
        damaged = "incomplete" if chunk == "end" else f"its {chunk} chunk is damaged"
        reason = damaged if chunk else describe(error)
        raise UserError("image_unreadable", f"{path}: not a readable image ({reason})") from error
    if text is None:
        return _from_comment(comment)
    try:
        provenance = parse_json(text)
    except ValueError as error:
        raise UserError("trace_invalid", f"{path}: its provenance is not valid JSON") from error
    return provenance if isinstance(provenance, dict) else None


def _from_comment(comment: object) -> dict[str, Any] | None:
    """Our provenance from an EXIF UserComment; None for other comments."""
    if not isinstance(comment, bytes) or not comment.startswith(_ASCII):
        return None
    try:
        value = parse_json(comment.removeprefix(_ASCII))
    except ValueError:
        return None
    return value.get(PROVENANCE) if isinstance(value, dict) else None
