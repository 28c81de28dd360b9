"""Data in and out: what people have, as pairs that training takes; and pairs, as what other trainers take.

    import_data("edits/", "edits-pairs", "imagefolder")
    export_data("runs/first", "for-uno", "uno")

One file a format; `rows` holds the protocol they follow and the one place where a row is checked.
"""

from __future__ import annotations

from diptych.data.interop import ai_toolkit, imagefolder, parquet, simpletuner, uno, webdataset
from diptych.data.interop.rows import Format
from diptych.errors import UsageError, nearest

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        parquet.FORMAT,
        parquet.EDITS,
        webdataset.FORMAT,
        imagefolder.FORMAT,
        ai_toolkit.FORMAT,
        simpletuner.FORMAT,
        uno.FORMAT,
    )
}


def find(name: str) -> Format:
    """The format of a name; UsageError with the nearest one."""
    if name not in FORMATS:
        raise UsageError(f"unknown format '{name}'{nearest(name, FORMATS)}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def table() -> str:
    """The formats, for people."""
    return "\n".join(f"{each.name:<13}{each.about}" for each in FORMATS.values())
