"""Seals: hashes inside an image, with which `diptych trace` detects bytes that changed since it was written.

`seal` in the provenance has two hashes: of the image and of the text. In a PNG or a lossless WebP the image is the
pixels, so better compression changes nothing. The pixels of a JPEG depend on the decoder, so there it is every byte of
the file except the EXIF segment and a C2PA manifest. A seal is not a signature: anyone who edits an image can also
rewrite its hashes. `diptych sign` adds a signature.
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
    """sha256 of the size and pixels of an RGB image."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return sha256(f"{rgb.width}x{rgb.height}\0".encode() + rgb.tobytes())


def coded_hash(data: bytes) -> str:
    """sha256 of a JPEG up to its end marker, without its EXIF segment and without a C2PA manifest, which is added
    later. Bytes after the end are not part of the image."""
    kept, at = bytearray(data[:2]), 2
    for start, end, is_manifest in segments(data):
        if data[start + 1] != _EXIF_SEGMENT and not is_manifest:
            kept += data[start:end]
        at = end
    return sha256(bytes(kept) + data[at : jpeg_end(data)])


def text_hash(provenance: dict[str, Any]) -> str:
    """sha256 of the provenance without its seal."""
    return sha256_json({key: value for key, value in provenance.items() if key != KEY}, ensure_ascii=False)


def sealed(provenance: dict[str, Any], picture: str) -> dict[str, Any]:
    """The provenance with its seal; `picture` is `pixels_hash` or `coded_hash`."""
    # As it will be read back: JSON has no tuples, and only text as keys.
    text = json.loads(json.dumps(provenance))
    return {**text, KEY: {"picture": picture, "text": text_hash(text)}}


def broken_chunk(data: bytes) -> str | None:
    """The kind of the first chunk of a PNG with a wrong checksum; `"end"` if the end is missing."""
    for kind, start, end in chunks(data):
        if struct.pack(">I", zlib.crc32(kind + data[start:end])) != data[end : end + 4]:
            return kind.decode("latin-1")
        if kind == b"IEND":
            return None
    return "end"


# Detecting a C2PA manifest from the bytes alone, because the library that reads one is an extra. In a PNG it is the
# chunk `caBX`, in a WebP the chunk `C2PA`, in a JPEG one or more APP11 segments that together form a JUMBF box of its
# kind (C2PA specification 2, "Embedding manifests into various file formats").

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SCAN, _END, _APP11 = 0xDA, 0xD9, 0xEB  # between the markers of scan and end, a JPEG is coded pixels
_STORE = b"jumdc2pa\x00\x11\x00\x10\x80\x00\x00\xaa\x00\x38\x9b\x71"  # the box that names the kind of a JUMBF box


def holds_manifest(data: bytes) -> bool:
    """Whether a PNG, JPEG or WebP has a C2PA manifest; False for anything else."""
    if data.startswith(b"\xff\xd8"):
        return any(is_manifest for _, _, is_manifest in segments(data))
    if data.startswith(PNG_SIGNATURE):
        return any(kind == b"caBX" for kind, _, _ in chunks(data))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return b"C2PA" in _riff_kinds(data)
    return False


def segments(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """Segments of a JPEG before its first scan: start, end, and whether it belongs to a C2PA manifest."""
    boxes: set[bytes] = set()  # numbers of C2PA's boxes; a long box continues in the next segment
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
    """Position after a JPEG's end marker; the file's length if it has none."""
    at = next((end for _, end, _ in reversed(list(segments(data)))), 2)
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        marker = data[at + 1]
        if marker == _END:
            return at + 2
        # In coded pixels, FF 00 is a byte of 255 and FF FF is padding; restart markers occur. Others have a length.
        if marker == 0xFF:
            at += 1
        elif marker == 0x00 or 0xD0 <= marker <= 0xD7:
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return len(data)


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Complete chunks of a PNG: kind, start and end of their bytes. The checksum follows the end."""
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
