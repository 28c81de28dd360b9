"""Seed captions: what a language model is inspired by, so that its grids do not all show the same few things.

    captions = read("captions.jsonl", column="text")
    captions.texts[0]

A text file (one caption a line), JSONL or parquet; a folder of those; or any fsspec address of one, such as
`hf://datasets/OWNER/NAME/data` on the hub. Captions are other people's text: they are data here and in every question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from diptych.errors import UsageError, UserError, describe, nearest
from diptych.llm.question import clean
from diptych.utils.documents import parse_json, stream_lines
from diptych.utils.io import sha256_json

KINDS = (".txt", ".jsonl", ".parquet")
LONGEST = 1000  # characters of a caption
MOST = 1_000_000  # captions of a source; what follows is not read
COLUMN = "caption"


@dataclass(frozen=True)
class Captions:
    """Different captions in their source's order, each with its category ("" where none is read)."""

    texts: list[str]
    categories: list[str]
    left_out: dict[str, int]
    """Reason → how many rows of the source are no caption."""
    digest: str
    """sha256 of the captions and their categories, wherever they lie."""

    def of(self, category: str) -> list[int]:
        """The places in `texts` of a category."""
        return [place for place, name in enumerate(self.categories) if name == category]

    def line(self) -> str:
        """What was left out, for people; "" if nothing was."""
        count = sum(self.left_out.values())
        why = ", ".join(f"{number} {reason}" for reason, number in self.left_out.items())
        return f"{count} of {count + len(self.texts)} seed captions are left out ({why})" if count else ""


def read(source: str, column: str = COLUMN, category_column: str | None = None) -> Captions:
    """The captions of a source; rows that are none (empty, broken, too long, there already) are counted, not fatal.

    UserError if it cannot be read or holds no caption, UsageError for a column that is not there.
    """
    return _read(source, column, category_column, _stamp(source))


@lru_cache(maxsize=2)
def _read(source: str, column: str, category_column: str | None, stamp: object) -> Captions:
    """`stamp` tells one state of the source from another: a run asks for its captions several times."""
    texts: list[str] = []
    categories: list[str] = []
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    for text, category in _rows(source, column, category_column):
        if not isinstance(text, str):
            left_out["not text"] += 1
            continue
        caption = " ".join(clean(text).split())
        if not caption or len(caption) > LONGEST:
            left_out[f"over {LONGEST} characters" if caption else "empty"] += 1
        elif caption.casefold() in seen:
            left_out["repeated"] += 1
        else:
            seen.add(caption.casefold())
            texts.append(caption)
            categories.append("" if category is None else " ".join(str(category).split()))
            if len(texts) == MOST:
                break
    if not texts:
        found = ", ".join(f"{number} {reason}" for reason, number in left_out.items()) or "it is empty"
        raise UserError(f"{source}: no seed captions there ({found})")
    digest = sha256_json([texts, categories])
    return Captions(texts, categories, dict(left_out), digest)


def _stamp(source: str) -> object:
    path = Path(source).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists())


def _rows(source: str, column: str, category_column: str | None) -> Iterator[tuple[Any, Any]]:
    """(caption, category) as the files hold them, None for what is broken."""
    import fsspec
    import pyarrow as pa

    try:
        address = source if "://" in source else str(Path(source).expanduser())
        files, path = fsspec.core.url_to_fs(address)
        names = [path]
        if files.isdir(path):
            names = sorted(name for name in files.find(path) if Path(name).suffix.lower() in KINDS)
        elif not files.exists(path):
            raise UserError(f"{source}: no such file or folder of seed captions")
        for name in names:
            kind = Path(name).suffix.lower()
            if kind not in KINDS:
                raise UsageError(f"{source}: seed captions are {', '.join(KINDS)} files, or folders of them")
            with files.open(name, "rb") as stream:
                if kind == ".parquet":
                    yield from _parquet(stream, name, column, category_column)
                else:
                    yield from _lines(stream_lines(stream, name), name, kind, column, category_column)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        raise UserError(f"{source}: the seed captions cannot be read ({describe(error)})") from error


def _parquet(stream: Any, name: str, column: str, category_column: str | None) -> Iterator[tuple[Any, Any]]:
    import pyarrow.parquet as pq

    part = pq.ParquetFile(stream)
    wanted = [column, *([category_column] if category_column else [])]
    for one in wanted:
        if one not in part.schema_arrow.names:
            raise _no_column(name, one, part.schema_arrow.names)
    for batch in part.iter_batches(columns=wanted):
        for row in batch.to_pylist():
            yield row[column], row[category_column] if category_column else None


def _lines(
    lines: Iterator[str], name: str, kind: str, column: str, category_column: str | None
) -> Iterator[tuple[Any, Any]]:
    if kind == ".txt" and category_column:
        raise UsageError(f"{name}: a text file has no column '{category_column}'; use JSONL or parquet")
    met = False
    for line in lines:
        if kind == ".txt" or not line.strip():
            yield line, None
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError):
            yield None, None
            continue
        if not isinstance(row, dict):
            yield None, None
            continue
        for one in (column, category_column):
            if one and one not in row and not met:
                raise _no_column(name, one, list(row))
        met = True
        yield row.get(column), row.get(category_column) if category_column else None


def _no_column(name: str, column: str, known: list[str]) -> UsageError:
    return UsageError(f"{name}: no column '{column}'; it has {', '.join(known)}{nearest(column, known)}")
