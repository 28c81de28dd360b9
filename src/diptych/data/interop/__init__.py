"""Data in and out: import data sets of other formats as pairs, and export pairs for other trainers.

    import_data("edits/", "edits-pairs", "imagefolder")
    export_data("runs/first", "for-uno", "uno")

One file per format; `rows` has their protocol.
"""

from __future__ import annotations

from diptych.data.interop import (
    ai_toolkit,
    diffsynth,
    imagefolder,
    musubi,
    onetrainer,
    parquet,
    simpletuner,
    uno,
    webdataset,
)
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
        musubi.FORMAT,
        diffsynth.FORMAT,
        onetrainer.FORMAT,
    )
}


def find(name: str) -> Format:
    """The format of this name. UsageError, with the nearest name, if there is none."""
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise UsageError("name_unknown", f"unknown format '{name}'{nearest(name, FORMATS)}; the formats are {known}")
    return FORMATS[name]


def table() -> str:
    """The list of formats as text."""
    return "\n".join(f"{each.name:<13}{each.about}" for each in FORMATS.values())
