"""The hashes that a picture carries of itself, so that `diptych trace` finds a byte that changed since it was written.

`seal` in the provenance holds two: of what the picture shows, and of what it says. What it shows is, in a PNG or a
lossless WebP, the pixels: a program that packs them better changes nothing. A JPEG's pixels depend on who decodes them,
so there it is every byte of the file but the EXIF segment and a C2PA manifest. A seal is no signature: who forges one
may forge both. `diptych sign` adds one.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diptych.utils.io import sha256, sha256_json

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "seal"
_EXIF_SEGMENT = 0xE1


def pixels_hash(image: Image) -> str:
    """sha256 of an RGB picture's size and pixels."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return sha256(f"{rgb.width}x{rgb.height}\0".encode() + rgb.tobytes())


def coded_hash(data: bytes) -> str:
    """sha256 of a JPEG's image: the file up to its end marker, without its EXIF segment and a C2PA manifest, which is
    put in later. Bytes behind the end are no part of the image."""
    kept, at = bytearray(data[:2]), 2
    for start, end, is_manifest in segments(data):
        if data[start + 1] != _EXIF_SEGMENT and not is_manifest:
            kept += data[start:end]
        at = end
    return sha256(bytes(kept) + data[at : jpeg_end(data)])


def text_hash(provenance: dict[str, Any]) -> str:
    """sha256 of what a picture says, the seal left out."""
    told = {key: value for key, value in provenance.items() if key != KEY}
    return sha256_json(told, ensure_ascii=False)


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


# Whether a picture's file holds a C2PA manifest, told from its bytes alone: the library that reads one is an extra.
# In a PNG it is the chunk `caBX`, in a WebP the chunk `C2PA`, in a JPEG one or more APP11 segments that together are
# one JUMBF box of C2PA's kind (C2PA specification 2, "Embedding manifests into various file formats").

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SCAN, _END, _APP11 = 0xDA, 0xD9, 0xEB  # from a scan's marker to the end's a JPEG is coded pixels
_STORE = b"jumdc2pa\x00\x11\x00\x10\x80\x00\x00\xaa\x00\x38\x9b\x71"  # the box that says what a JUMBF box holds


def holds_manifest(data: bytes) -> bool:
    """Whether a PNG, JPEG or WebP carries a manifest; False for anything else. Reads no further than it must."""
    if data.startswith(b"\xff\xd8"):
        return any(is_manifest for _, _, is_manifest in segments(data))
    if data.startswith(PNG_SIGNATURE):
        return any(kind == b"caBX" for kind, _, _ in chunks(data))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return b"C2PA" in _riff_kinds(data)
    return False


def segments(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """A JPEG's segments before its first scan: start, end, and whether it is of a C2PA manifest."""
    boxes: set[bytes] = set()  # numbers of the boxes that are C2PA's: one longer than a segment goes on in the next
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _SCAN:
        end = at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        # After the length: "JP", the box's number, the piece's, the box's length and kind.
        common, number = data[at + 4 : at + 6], data[at + 6 : at + 8]
        jumbf = data[at + 1] == _APP11 and common == b"JP" and data[at + 16 : at + 20] == b"jumb"
        if jumbf and data[at + 24 : at + 24 + len(_STORE)] == _STORE:
            boxes.add(number)
        yield at, end, jumbf and number in boxes
        at = end


def jpeg_end(data: bytes) -> int:
    """Where a JPEG's image ends, behind its end marker; the file's length if it has none."""
    at = next((end for _, end, _ in reversed(list(segments(data)))), 2)
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        marker = data[at + 1]
        if marker == _END:
            return at + 2
        # Coded pixels write a byte of 255 as FF 00 and hold restart markers; FF FF is padding. All else has a length.
        if marker == 0xFF:
            at += 1
        elif marker == 0x00 or 0xD0 <= marker <= 0xD7:
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return len(data)


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """A PNG's whole chunks: kind, where their bytes start and end. The checksum follows the end."""
    at = len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        start = at + 8
        end = start + struct.unpack(">I", data[at : at + 4])[0]
        yield data[at + 4 : start], start, end
        at = end + 4


def _riff_kinds(data: bytes) -> Iterator[bytes]:
    at = 12
    while at + 8 <= len(data):
        yield data[at : at + 4]
        size = struct.unpack("<I", data[at + 4 : at + 8])[0]
        at += 8 + size + size % 2
