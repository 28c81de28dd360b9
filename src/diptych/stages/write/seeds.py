"""Seed captions, which inspire a language model so that its grids do not all show the same few things.

    captions = read("captions.jsonl", column="text")
    captions.texts[0]

A source is a text file (one caption a line), a JSONL or parquet file, a folder of these, or an fsspec address such as
`hf://datasets/OWNER/NAME/data` on the hub. Captions are other people's text, so they are data here and in questions.
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
MAX_LENGTH = 1000  # characters of a caption
MAX_CAPTIONS = 1_000_000  # of a source; the rest is not read
COLUMN = "caption"


@dataclass(frozen=True)
class SeedCaptions:
    """Different captions in their source's order, each with its category ("" where none is read)."""

    texts: list[str]
    categories: list[str]
    left_out: dict[str, int]
    """Number of rows of the source that are not captions, by reason."""
    digest: str
    """SHA-256 of the captions and their categories, independent of their path."""

    def of(self, category: str) -> list[int]:
        """Return the indices in `texts` of a category."""
        return [index for index, name in enumerate(self.categories) if name == category]

    def line(self) -> str:
        """Return a line about the rows that were left out; "" if none were."""
        count = sum(self.left_out.values())
        why = ", ".join(f"{number} {reason}" for reason, number in self.left_out.items())
        return f"{count} of {count + len(self.texts)} seed captions are left out ({why})" if count else ""


def read(source: str, column: str = COLUMN, category_column: str | None = None) -> SeedCaptions:
    """Read the captions of a source. Rows that are not captions (empty, broken, too long, repeated) are counted.

    Raises UserError if the source cannot be read or has no captions, UsageError for an unknown column.
    """
    return _read(source, column, category_column, _stamp(source))


@lru_cache(maxsize=2)
def _read(source: str, column: str, category_column: str | None, stamp: object) -> SeedCaptions:
    """`stamp` identifies the state of the source for the cache, because a run reads its captions several times."""
    texts: list[str] = []
    categories: list[str] = []
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    for text, category in _rows(source, column, category_column):
        if not isinstance(text, str):
            left_out["not text"] += 1
            continue
        caption = " ".join(clean(text).split())
        if not caption or len(caption) > MAX_LENGTH:
            left_out[f"over {MAX_LENGTH} characters" if caption else "empty"] += 1
        elif caption.casefold() in seen:
            left_out["repeated"] += 1
        else:
            seen.add(caption.casefold())
            texts.append(caption)
            categories.append("" if category is None else " ".join(str(category).split()))
            if len(texts) == MAX_CAPTIONS:
                break
    if not texts:
        why = ", ".join(f"{number} {reason}" for reason, number in left_out.items()) or "it is empty"
        raise UserError("run_empty", f"No seed captions in {source} ({why}). Check the file and write.caption_column.")
    return SeedCaptions(texts, categories, dict(left_out), sha256_json([texts, categories]))


def _stamp(source: str) -> object:
    path = Path(source).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists())


def _rows(source: str, column: str, category_column: str | None) -> Iterator[tuple[Any, Any]]:
    """Yield (caption, category) as the files have them, None for what is broken."""
    import fsspec
    import pyarrow as pa

    try:
        address = source if "://" in source else str(Path(source).expanduser())
        files, path = fsspec.core.url_to_fs(address)
        names = [path]
        if files.isdir(path):
            names = sorted(name for name in files.find(path) if Path(name).suffix.lower() in KINDS)
        elif not files.exists(path):
            raise UserError("path_not_found", f"Seed captions not found: {source}. Check write.captions.")
        for name in names:
            kind = Path(name).suffix.lower()
            if kind not in KINDS:
                known = f"Use {', '.join(KINDS)} files, or a folder of them."
                raise UsageError("file_format_unknown", f"{source} is not in a format for seed captions. {known}")
            with files.open(name, "rb") as stream:
                if kind == ".parquet":
                    yield from _parquet(stream, name, column, category_column)
                else:
                    yield from _lines(stream_lines(stream, name), name, kind, column, category_column)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        raise UserError("path_unreadable", f"Cannot read the seed captions {source} ({describe(error)}).") from error


def _parquet(stream: Any, name: str, column: str, category_column: str | None) -> Iterator[tuple[Any, Any]]:
    import pyarrow.parquet as pq

    part = pq.ParquetFile(stream)
    columns = [column, *([category_column] if category_column else [])]
    for one in columns:
        if one not in part.schema_arrow.names:
            raise _no_column(name, one, part.schema_arrow.names)
    for batch in part.iter_batches(columns=columns):
        for row in batch.to_pylist():
            yield row[column], row[category_column] if category_column else None


def _lines(
    lines: Iterator[str], name: str, kind: str, column: str, category_column: str | None
) -> Iterator[tuple[Any, Any]]:
    if kind == ".txt" and category_column:
        message = f"{name} is a text file and has no column '{category_column}'. Use JSONL or parquet."
        raise UsageError("recipe_conflict", message)
    checked = False
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
            if one and one not in row and not checked:
                raise _no_column(name, one, list(row))
        checked = True
        yield row.get(column), row.get(category_column) if category_column else None


def _no_column(name: str, column: str, known: list[str]) -> UsageError:
    message = f"{name} has no column '{column}'. Its columns: {', '.join(known)}{nearest(column, known)}"
    return UsageError("recipe_invalid", message)
