"""WebDataset: tar files with adjacent members of one key: `KEY.conditioning.png`, `KEY.image.png`, `KEY.json`.

The text may be in `KEY.txt` or `KEY.caption`; a plain `KEY.png` is the target. Tars are read sequentially, so they may
be compressed, and nothing is unpacked onto the disk.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diptych.data.formats import READ
from diptych.data.images import MAX_BYTES
from diptych.data.interop.folders import row_text
from diptych.data.interop.rows import Entry, Format, NamedRows, Options, columns_of, extension, text_of
from diptych.data.pairs import SIDES, find_columns, named
from diptych.data.sources import choose
from diptych.errors import UserError
from diptych.utils.documents import parse_json
from diptych.utils.io import sha256, write_atomic
from diptych.utils.paths import inside, refuse_special

_TEXT = {"txt": "caption", "caption": "caption", "text": "caption", "instruction.txt": "instruction"}
_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2")


class TarReader:
    """A reader of a tar, or of a folder of tars in the order of their names."""

    def __init__(self, place: str, options: Options) -> None:
        path = Path(place).expanduser()
        if not path.exists():
            raise UserError("path_not_found", f"{place}: no such file or folder")
        if path.is_dir():
            names = sorted(p.name for p in path.iterdir() if p.name.endswith(_ENDINGS))
            if not names:
                raise UserError("path_not_found", f"{place} has no tar files ({', '.join(_ENDINGS)})")
            self.files = [inside(path, name) for name in choose(names, options.split, place)]
        else:
            self.files = [refuse_special(path)]
        self.options = options
        self._names: dict[str, str] = {}
        self._counts = [sum(1 for _ in self._groups(file, read=False)) for file in self.files]

    def __len__(self) -> int:
        return sum(self._counts)

    def fingerprint(self) -> str:
        return sha256(repr([(file.name, file.stat().st_size) for file in self.files]))

    def entries(self, start: int) -> Iterator[Entry]:
        for file, count in zip(self.files, self._counts, strict=True):
            if start >= count:
                start -= count
                continue
            for n, (key, members) in enumerate(self._groups(file, skip=start), start):
                yield Entry(f"{file.name}, sample {n}: {key}", lambda members=members: self._row(members))
            start = 0

    def _groups(self, file: Path, *, read: bool = True, skip: int = 0) -> Iterator[tuple[str, list[Any]]]:
        """Yields (key, members as (name, bytes)) of the samples after the first `skip`. No bytes unless `read`."""
        key, members, number = "", [], -1
        size = file.stat().st_size if file.suffix == ".tar" else None
        try:
            if size is not None and size % tarfile.BLOCKSIZE:
                raise tarfile.ReadError("incomplete")
            with tarfile.open(file, "r:*") as tar:
                for member in tar:
                    # tarfile treats the end of a file as the end of its archive.
                    if size is not None and member.offset_data + member.size > size:
                        raise tarfile.ReadError("incomplete")
                    folder, _, name = member.name.rpartition("/")
                    if not member.isfile() or name.startswith("."):
                        continue
                    stem, _, rest = name.partition(".")
                    stem = f"{folder}/{stem}"
                    if stem != key:
                        if members and number >= skip:
                            yield key.lstrip("./"), members
                        key, members, number = stem, [], number + 1
                    data = b""
                    if read and number >= skip and member.size <= MAX_BYTES:
                        data = tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
                    members.append((rest, data))
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            message = f"{file}: damaged after sample {number} ({str(error)[:120]}); fetch it again"
            raise UserError("file_damaged", message) from error
        if members and number >= skip:
            yield key.lstrip("./"), members

    def _row(self, members: list[tuple[str, bytes]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        described: dict[str, Any] = {}
        if len({name for name, _ in members}) < len(members):
            raise UserError("row_invalid", "two members have the same name")
        for name, data in members:
            column, _, ending = name.rpartition(".")
            if f".{ending.lower()}" in READ:
                values[column or "image"] = data
            elif ending == "json":
                described |= _object(name, data)
            elif name in _TEXT:
                values[self.options.text if name == "txt" else _TEXT[name]] = row_text(data, name)
        values |= described
        if not self._names:
            self._names = find_columns(list(values), self.options.columns, "a sample of this data set")
        return named(values, self._names)


def _object(name: str, data: bytes) -> dict[str, Any]:
    try:
        values = parse_json(row_text(data, name))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError("json_invalid", f"{name}: invalid JSON ({str(error)[:80]})") from error
    if not isinstance(values, dict):
        raise UserError("json_invalid", f"{name}: a JSON {type(values).__name__}, not an object")
    return values


def write(folder: Path, shard: int, of: int, rows: NamedRows, options: Options) -> list[dict[str, Any]]:
    """Writes the tar of a shard, without time, owner or mode, so that equal rows give equal bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, row in rows:
            described = json.dumps(columns_of(row), sort_keys=True, ensure_ascii=False)
            members = {f"{side}{extension(row[side]['bytes'])}": row[side]["bytes"] for side in SIDES}
            members |= {"json": described.encode(), "txt": text_of(row, options.text).encode()}
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    write_atomic(folder / f"train-{shard:05d}.tar", out.getvalue())
    return []


_LOADS = 'load_dataset("webdataset", data_files="{folder}/*.tar", split="train")'
FORMAT = Format(
    "webdataset", "tars: KEY.conditioning.png, KEY.image.png, KEY.json, KEY.txt", TarReader, write, True, _LOADS
)
