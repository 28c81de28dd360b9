"""The one reader of text files that people wrote: captions, prompts, JSONL, CSV, YAML, word lists.

They are UTF-8, with or without a byte order mark. Anything else is refused with the file, the place and what to do:
a guess would put wrong letters into prompts and captions, and nobody would see it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

from diptych.errors import UsageError, UserError

MARK = "\ufeff"  # a byte order mark once it is decoded
# The longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_FOREIGN = 1 / 3  # share of bytes above 127 from which a line is hardly a Western European language in Latin-1


def read_text(path: Path) -> str:
    """A text file, its line ends as `\\n`. UsageError if it is not UTF-8, UserError if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    return decode(data, str(path))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without their ends. Errors are those of `read_text`.

    Other characters that Unicode calls ends of a line stay inside a line, because JSON strings may hold them.
    """
    lines = read_text(path).split("\n")
    return lines if lines[-1] else lines[:-1]


def stream_lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """The same from an open file, which may be larger than memory."""
    for number, raw in enumerate(stream, 1):
        # The first two bytes of a UTF-16 file say so only at its start.
        yield from decode(raw, name, number).removesuffix("\n").split("\n")


def decode(data: bytes, name: str, line: int = 1) -> str:
    """Bytes as text, without byte order marks; `name` and `line` are where they begin. UsageError if not UTF-8."""
    nul = data.find(0)
    try:
        text, at = data.decode("utf-8-sig"), nul
    except UnicodeDecodeError as error:
        text, at = "", min(error.start, nul) if nul >= 0 else error.start
    if at < 0:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        # Files that were joined have a mark wherever one of them began.
        return text.lstrip(MARK).replace(f"\n{MARK}", "\n")
    start = data.rfind(b"\n", 0, at) + 1
    encoding, code = _guess(data, data[start:].partition(b"\n")[0], line == 1)
    raise UsageError(
        f"{name}, line {line + data[:at].count(10)}, byte {at - start + 1}: this is not UTF-8; by its bytes it is "
        f"{encoding}. Save the file as UTF-8, for instance with: iconv -f {code} -t UTF-8 OLD > NEW"
    )


def _guess(data: bytes, row: bytes, is_start: bool) -> tuple[str, str]:
    """What encoding text that is not UTF-8 seems to have, and iconv's name for it. `row` is the first such line."""
    for mark, name in _MARKS.items() if is_start else ():
        if data.startswith(mark):
            return name, name
    if b"\0" in data:
        wide = data.count(0) > len(data) / 4
        return ("UTF-16", "UTF-16LE" if data[1:2] == b"\0" else "UTF-16BE") if wide else ("not text", "ENCODING")
    if sum(byte > 127 for byte in row) > _FOREIGN * len(row):
        return "an East Asian or Cyrillic encoding", "ENCODING"
    return "Latin-1 (Windows-1252)", "WINDOWS-1252"
