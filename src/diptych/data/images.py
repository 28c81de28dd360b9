"""Images in and out. In: whatever people have, refused before it can hurt. Out: a picture that says what made it.

A file is opened only after its size in bytes and in pixels is known to be sane, so a decompression bomb is refused
before it is decoded. What comes back is always plain RGB, upright, in sRGB, alpha laid over white or a chosen colour;
of an animation, the first frame. What goes out is PNG, lossless WebP or JPEG, its provenance inside.
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
MAX_PIXELS = 64_000_000  # a 100-megapixel bomb is out, every camera in use is in
PROGRAMS = ("EPS", "WMF")  # drawn by running them: Pillow hands EPS to Ghostscript
PROVENANCE = "diptych"  # the PNG text chunk that holds the JSON
READABLE = "parameters"  # and the one that image viewers of this field show
KINDS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}  # what is written, by the name's end
_SAVING: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 6},
    "WEBP": {"lossless": True, "quality": 80, "method": 4},  # lossless: `quality` is effort here
    "JPEG": {"quality": 95, "subsampling": 0},
}
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_ASCII = b"ASCII\0\0\0"  # EXIF's name for the text that follows
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
    """An image file, its bytes, or a row's `{bytes, path}` cell as upright RGB; any mode, alpha over `background`.

    Raises UserError, one line that says what is wrong with which image: missing, empty, not an image, a program that
    would draw one, cut short, larger than `max_bytes` or `max_pixels`, or of a kind that is not one of
    `formats` (Pillow's names; None: any). `name` is what the message calls bytes.
    """
    from PIL import Image

    if isinstance(source, dict):
        # A row is data: what its path names on this machine is none of its business.
        name = name or source.get("path")
        place: str | Path | bytes | None = source.get("bytes")
    else:
        place = source
    if place is None:
        raise UserError(f"{name or 'image'}: there is no image")
    label = name or ("image" if isinstance(place, bytes) else str(place))
    data = place if isinstance(place, bytes) else _read(Path(place), max_bytes)
    if not data:
        raise UserError(f"{label}: the file is empty")
    if len(data) > max_bytes:
        raise UserError(f"{label}: {documents.size(len(data))} is over the limit of {documents.size(max_bytes)}")
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb warning comes at another limit; ours is checked before anything is decoded.
            warnings.simplefilter("ignore")
            image = open_header(data, label, formats)
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(
                    f"{label}: {width}×{height} is {width * height / 1e6:.0f} megapixels, "
                    f"over the limit of {max_pixels / 1e6:.0f}; make it smaller first"
                )
            if image.format in PROGRAMS:
                raise UserError(f"{label}: {image.format} is a program that draws, not run here; make it a PNG")
            image.load()
            return to_rgb(image, background)
    except Image.DecompressionBombError:
        raise UserError(f"{label}: far more pixels than the limit of {max_pixels / 1e6:.0f} megapixels") from None
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise anything on broken files, AVIF's a RuntimeError
        raise UserError(f"{label}: the image is broken or cut short ({describe(error)})") from error


def _read(path: Path, max_bytes: int) -> bytes:
    path = here_or_packaged(path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise UserError(f"{path}: {documents.size(size)} is over the limit of {documents.size(max_bytes)}")
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)  # a device has no size and no end
        if len(data) > max_bytes:
            raise UserError(f"{path}: over the limit of {documents.size(max_bytes)}")
        return data
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not an image") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def check_image(path: str | Path) -> str:
    """sha256 of a picture's bytes; UserError for what its size and header already tell against it. Decodes nothing."""
    from PIL import Image

    data = _read(Path(path), MAX_BYTES)
    if not data:
        raise UserError(f"{path}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            width, height = open_header(data, str(path)).size
    except UserError:
        raise
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not an image that can be opened ({describe(error)})") from error
    if width * height > MAX_PIXELS:
        raise UserError(f"{path}: {width}×{height} is over the limit of {MAX_PIXELS / 1e6:.0f} megapixels")
    return sha256(data)


def encode_png(image: Image, provenance: dict[str, Any] | None = None) -> bytes:
    """`encode` as PNG."""
    return encode(image, "PNG", provenance)


def encode(image: Image, kind: str, provenance: dict[Any, Any] | None = None) -> bytes:
    """An image as PNG, WEBP (lossless) or JPEG: the same bytes for the same picture and provenance.

    `provenance` is JSON with sorted keys: in a PNG the text chunk `diptych`, beside a line to read in `parameters`; in
    the others the EXIF UserComment, as `{"diptych": …}` in ASCII. It is sealed (`data.seal`). UserError if a JPEG
    cannot hold that much of it.
    """
    options = dict(_SAVING[kind])
    if provenance is not None:
        shown = seal.coded_hash(encode(image, kind)) if kind == "JPEG" else seal.pixels_hash(image)
        provenance = seal.sealed(provenance, shown)
        options |= {"pnginfo": _png_text(provenance)} if kind == "PNG" else {"exif": _exif(provenance)}
        if kind == "JPEG" and len(options["exif"]) > _MAX_JPEG_EXIF:
            raise UserError("the provenance, prompt included, is too long for a JPEG; write a PNG or WebP")
    out = io.BytesIO()
    # `info` of an opened file (profiles, dpi, old text) must not leak into ours.
    documents = image.copy()
    documents.info = {}
    documents.save(out, kind, **options)
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
    """An image as a row's cell: `{"bytes": …, "path": path}`. PNG and WEBP lose nothing; JPEG is fastest by far."""
    return {"bytes": encode(image, kind), "path": path}


def kind_of(path: str | Path) -> str:
    """PNG, WEBP or JPEG, by how a file's name ends. UsageError for any other."""
    suffix = Path(path).suffix.lower()
    if suffix not in KINDS:
        raise UsageError(f"{path}: pictures are written as PNG, WebP or JPEG; end the name in .png, .webp or .jpg")
    return KINDS[suffix]


def save_image(image: Image, path: str | Path, provenance: dict[Any, Any] | None = None) -> Path:
    """Writes a PNG, WebP or JPEG with its provenance, whole or not at all; makes the folder. UserError if it cannot."""
    path = Path(path)
    kind = kind_of(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made ({error.strerror or error})") from error
    write_atomic(path, encode(image, kind, provenance))
    return path


def read_provenance(source: str | Path | bytes) -> dict[str, Any] | None:
    """What made a PNG, WebP or JPEG (a file, or its bytes); None if it does not say. UserError if it is no image."""
    told = _read_text(_label(source), _bytes(source))
    return None if told is None else {key: value for key, value in told.items() if key != seal.KEY}


def broken_seal(source: str | Path | bytes) -> list[str] | None:
    """What of a picture is not as it was written: `pixels` (in a JPEG `image data`), `text`, a chunk of the file; None
    if it has no seal. Bytes behind the end of the image are not part of it.

    UserError if it is no image, or one that can no longer be decoded.
    """
    data = _bytes(source)
    told = _read_text(_label(source), data)
    if told is None or not isinstance(said := told.get(seal.KEY), dict):
        return None
    broken = [] if seal.text_hash(told) == said.get("text") else ["text"]
    if data.startswith(b"\xff\xd8"):
        part, shown = "image data", seal.coded_hash(data)
    else:
        part, shown = "pixels", seal.pixels_hash(open_image(data, name=_label(source)))
    if shown != said.get("picture"):
        broken.append(part)
    if not broken and data.startswith(b"\x89PNG") and (chunk := seal.broken_chunk(data)):
        broken.append(f"{chunk} chunk")
    return broken


def _bytes(source: str | Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else _read(Path(source), MAX_BYTES)


def _label(source: str | Path | bytes) -> str:
    return "image" if isinstance(source, bytes) else str(source)


def _read_text(path: str, data: bytes) -> dict[str, Any] | None:
    """The provenance in a file's bytes, seal and all; None if there is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            text = image.info.get(PROVENANCE)
            comment = None if text is not None else image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        chunk = seal.broken_chunk(data) if data.startswith(b"\x89PNG") else None
        damaged = "cut short" if chunk == "end" else f"its {chunk} chunk is damaged"
        reason = damaged if chunk else describe(error)
        raise UserError(f"{path}: not a readable image ({reason})") from error
    if text is None:
        return _from_comment(comment)
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: its provenance is not valid JSON") from error
    return found if isinstance(found, dict) else None


def _from_comment(comment: object) -> dict[str, Any] | None:
    """Our provenance from an EXIF UserComment; None for anything else that people and cameras put there."""
    if not isinstance(comment, bytes) or not comment.startswith(_ASCII):
        return None
    try:
        found = parse_json(comment.removeprefix(_ASCII))
    except ValueError:
        return None
    return found.get(PROVENANCE) if isinstance(found, dict) else None
