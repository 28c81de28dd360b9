"""The hashes that a picture carries of itself, so that `diptych trace` finds a byte that changed since it was written.

`seal` in the provenance holds two: of what the picture shows, and of what it says. What it shows is, in a PNG or a
lossless WebP, the pixels: a program that packs them better changes nothing. A JPEG's pixels depend on who decodes them,
so there it is every byte of the file but the EXIF segment and a C2PA manifest. A seal is no signature: who forges one
may forge both. `diptych sign` adds one.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from typing import TYPE_CHECKING, Any

from diptych.data.embedded import chunks, jpeg_end, segments

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "seal"
_EXIF_SEGMENT = 0xE1


def pixels_hash(image: Image) -> str:
    """sha256 of an RGB picture's size and pixels."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}\0".encode() + rgb.tobytes()).hexdigest()


def coded_hash(data: bytes) -> str:
    """sha256 of a JPEG's image: the file up to its end marker, without its EXIF segment and a C2PA manifest, which is
    put in later. Bytes behind the end are no part of the image."""
    kept, at = bytearray(data[:2]), 2
    for start, end, is_manifest in segments(data):
        if data[start + 1] != _EXIF_SEGMENT and not is_manifest:
            kept += data[start:end]
        at = end
    return hashlib.sha256(bytes(kept) + data[at : jpeg_end(data)]).hexdigest()


def text_hash(provenance: dict[str, Any]) -> str:
    """sha256 of what a picture says, the seal left out."""
    told = {key: value for key, value in provenance.items() if key != KEY}
    return hashlib.sha256(json.dumps(told, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sealed(provenance: dict[str, Any], picture: str) -> dict[str, Any]:
    """The provenance with its seal; `picture` is `pixels_hash` or `coded_hash`."""
    # As it will be read: JSON knows no tuples and no keys but texts.
    told = json.loads(json.dumps(provenance))
    return {**told, KEY: {"picture": picture, "text": text_hash(told)}}


def broken_chunk(data: bytes) -> str | None:
    """The kind of the first chunk of a PNG whose checksum is not that of its bytes; `"end"` if there is no end."""
    for kind, start, end in chunks(data):
        if struct.pack(">I", zlib.crc32(kind + data[start:end])) != data[end : end + 4]:
            return kind.decode("latin-1")
        if kind == b"IEND":
            return None
    return "end"
