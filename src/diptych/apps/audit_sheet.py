"""The audit without a browser: the pictures of a sample in a folder, and a spreadsheet that names them."""

from __future__ import annotations

from pathlib import Path

from diptych.apps.audit import Sample
from diptych.apps.audit_page import media_type
from diptych.data.labels import write_sheet
from diptych.data.store import write_atomic
from diptych.errors import UserError

_ENDINGS = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}


def write(sample: Sample, sheet: Path) -> Path:
    """Writes `sheet` and, beside it, a folder of the stored pictures, undecoded; returns the folder.

    File names are the line's number: an id may hold anything. The sheet comes last.
    """
    folder = sheet.with_name(f"{sheet.stem}-pictures")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror or error})") from error
    rows = []
    for number, pair in enumerate(sample.pairs, 2):  # as a spreadsheet counts its lines
        names = []
        for side in ("reference", "target"):
            data = sample.picture(pair.id, side)
            path = folder / f"{number:04d}-{side}{_ENDINGS.get(media_type(data), '.bin')}"
            write_atomic(path, data)
            names.append(f"{folder.name}/{path.name}")
        rows.append([pair.id, "", pair.subject, *names])
    write_sheet(sheet, rows)
    return folder
