"""Data sets: a folder with `part-00000.parquet`, `part-00001.parquet`, … and, last, `manifest.json`.

A part is published whole, so a process that is killed at any moment leaves only complete parts. On a local disk this is
a temporary name and a rename; elsewhere it is one put, because object stores make a put visible at once. The manifest
comes last and means that nothing is missing. Each part carries the fingerprint of what made it; a part with another
fingerprint is an error. The bytes contain no time, host or path: equal rows make equal files.

Before rows are read, the sha256 of their part is compared with the manifest, once per part and process, so that no
stage, training or evaluation works on damaged or swapped files. Single columns and rows, which statistics and pages
read, are not checked.

Any fsspec URL works (`memory://`, `s3://`, …). A folder has one writer at a time (`places.lock`).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UsageError, UserError, describe
from diptych.utils.documents import parse_json
from diptych.utils.io import clean, sha256, sha256_file, sha256_json, write_atomic
from diptych.utils.paths import inside, is_remote, plain_name

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FORMAT = 1
MANIFEST = "manifest.json"
BLOCK = 8 * 2**20  # bytes read at once to hash a file at an address
ROW_GROUP = 100  # rows; the size that the hub's viewer needs for image data
_PART = re.compile(r"part-(\d{5,})\.parquet")
_FINGERPRINT = b"diptych.fingerprint"
_CHECKED: set[tuple[str, str, Any]] = set()  # part, sha256 and state of files that this process has verified


class Dataset:
    """A folder of sharded parquet. Rows are dicts; an image is `{"bytes": …, "path": …}`.

    Args:
        url: the folder, or an fsspec address.
        schema: the columns; for reading it may be left out, and is then that of the parts.
    """

    def __init__(self, url: str | Path, schema: pa.Schema | None = None) -> None:
        self.url = str(url).rstrip("/")
        self.schema = schema
        self._hashes: dict[int, str] = {}
        self._named: tuple[Any, dict[str, str]] = (None, {})  # state of the manifest, and its hashes
        self._files = _Remote(self.url) if is_remote(self.url) else _Local(self.url)

    def __repr__(self) -> str:
        return f"Dataset({self.url!r})"

    # ---- parts

    def part_name(self, shard: int) -> str:
        """The file name of a shard."""
        return f"part-{shard:05d}.parquet"

    def shards(self) -> list[int]:
        """The numbers of the published parts, in order."""
        return sorted(int(m[1]) for name in self._files.names() if (m := _PART.fullmatch(name)))

    def shards_done(self, fingerprint: str | None = None) -> set[int]:
        """The published shards. UserError if a part has another fingerprint than the one given."""
        done = self.shards()
        for shard in done if fingerprint is not None else ():
            stored = self.part_fingerprint(shard)
            if stored != fingerprint:
                raise UserError(
                    "run_mismatch",
                    f"{self.url}/{self.part_name(shard)} was made by other settings, inputs or weights (fingerprint "
                    f"{stored[:12] or 'missing'}, expected {str(fingerprint)[:12]}); remove {self.url} to make it "
                    "again, or choose another --out",
                )
        return set(done)

    def part_fingerprint(self, shard: int) -> str:
        """The fingerprint stored in a part, or `""`."""
        with self.open_part(shard) as part:
            return (part.schema_arrow.metadata or {}).get(_FINGERPRINT, b"").decode()

    def write_shard(self, shard: int, rows: Sequence[dict[str, Any]], fingerprint: str = "") -> None:
        """Publishes a shard whole, in place of one with the same number. The columns must be those of the schema."""
        assert self.schema is not None, "writing needs a schema"
        data = encode(rows, self.schema, fingerprint)
        self._files.put(self.part_name(shard), data)
        self._hashes[shard] = sha256(data)

    def drop_shard(self, shard: int) -> None:
        """Removes a shard if it exists."""
        self._hashes.pop(shard, None)
        if shard in self.shards():
            self._files.remove(self.part_name(shard))

    def read_shard(self, shard: int) -> list[dict[str, Any]]:
        """All rows of a shard. UserError if the part is missing or damaged."""
        self.check(shard)
        with self._reading(shard), self.open_part(shard) as part:
            return part.read().to_pylist()

    def rows_in(self, shard: int) -> int:
        """Number of rows of a shard; reads only its footer."""
        with self.open_part(shard) as part:
            return part.metadata.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Rows in shard order. Memory holds one row group at a time."""
        for shard in self.shards():
            self.check(shard)
            with self._reading(shard), self.open_part(shard) as part:
                for batch in part.iter_batches(ROW_GROUP):
                    yield from batch.to_pylist()

    def __len__(self) -> int:
        return sum(self.rows_in(shard) for shard in self.shards())

    def columns(self, *names: str) -> list[dict[str, Any]]:
        """These columns of all rows; reads no other column."""
        rows: list[dict[str, Any]] = []
        for shard in self.shards():
            with self._reading(shard), self.open_part(shard) as part:
                rows += part.read(columns=list(names)).to_pylist()
        return rows

    def open_part(self, shard: int) -> pq.ParquetFile:
        """A part as pyarrow's reader, which the caller closes. UserError if it is missing or damaged."""
        import pyarrow.parquet as pq

        with self._reading(shard):
            part = pq.ParquetFile(self._files.source(self.part_name(shard)))
        if self.schema is None:
            metadata = {k: v for k, v in (part.schema_arrow.metadata or {}).items() if k != _FINGERPRINT}
            self.schema = part.schema_arrow.with_metadata(metadata or None)
        return part

    def _reading(self, shard: int) -> AbstractContextManager[None]:
        remedies = "; run the stage that makes it again", "; remove it and run again"
        return reading(f"{self.url}/{self.part_name(shard)}", *remedies)

    # ---- files as they are

    def names(self) -> list[str]:
        """Names of all files in the folder."""
        return self._files.names()

    def read_file(self, name: str) -> bytes:
        """The bytes of a file. FileNotFoundError if it is missing."""
        return self._files.read(name)

    def put_file(self, name: str, data: bytes) -> None:
        """Writes a file whole or not at all."""
        self._files.put(name, data)

    # ---- manifest

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest that `publish` wrote, or None while the data set is incomplete."""
        try:
            text = self._files.read(MANIFEST)
        except FileNotFoundError:
            return None
        try:
            return parse_json(text)
        except ValueError as error:
            raise UserError("store_damaged", f"{self.url}/{MANIFEST}: invalid JSON; remove it and run again") from error

    def manifest_hash(self) -> str:
        """sha256 of the manifest file, which identifies the whole content. UserError while the data set is
        incomplete."""
        try:
            return sha256(self._files.read(MANIFEST))
        except FileNotFoundError:
            self.check_complete()
            raise

    def check_complete(self) -> None:
        """UserError while the data set is incomplete."""
        if not self.is_complete():
            raise UserError("run_incomplete", f"{self.url} is not complete; run the stage that makes it first")

    def fingerprint(self) -> str:
        """sha256 of the manifest's hashes of the parts. UserError while the data set is incomplete."""
        self.check_complete()
        return sha256_json([part["sha256"] for part in (self.manifest or {})["parts"]])

    def publish(self, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
        """Writes the manifest, last: the keys of `manifest`, then counts and the sha256 of every part."""
        parts = []
        for shard in self.shards():
            if shard not in self._hashes:
                self._hashes[shard] = sha256(self._files.read(self.part_name(shard)))
            parts.append({"name": self.part_name(shard), "rows": self.rows_in(shard), "sha256": self._hashes[shard]})
        whole = {"format": FORMAT, **(manifest or {}), "rows": sum(p["rows"] for p in parts), "parts": parts}
        self._files.put(MANIFEST, (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode())
        return whole

    def unpublish(self) -> None:
        """Removes the manifest, so that the data set is incomplete again."""
        if MANIFEST in self._files.names():
            self._files.remove(MANIFEST)

    def is_complete(self, fingerprint: str | None = None) -> bool:
        """Whether there is a manifest (of `fingerprint`, if given) and every part that it lists."""
        manifest = self.manifest
        if manifest is None or (fingerprint is not None and manifest.get("fingerprint") != fingerprint):
            return False
        return {part["name"] for part in manifest["parts"]} == {self.part_name(shard) for shard in self.shards()}

    def verify(self) -> None:
        """Applies `check` to every part that the manifest lists."""
        for name in self._hashes_named():
            if match := _PART.fullmatch(name):
                self.check(int(match[1]))

    def check(self, shard: int) -> None:
        """Compares the sha256 of a part with the manifest, once in this process while the file does not change.

        UserError if it differs or the part is missing. Parts of an incomplete data set have no hash yet and pass.
        """
        name = self.part_name(shard)
        wanted = self._hashes_named().get(name)
        if wanted is None:
            return
        with self._reading(shard):
            key = (f"{self.url}/{name}", wanted, self._files.state(name))
            if key in _CHECKED:
                return
            actual = self._files.sha256(name)
        if actual != wanted:
            raise UserError(
                "store_damaged",
                f"{self.url}/{name}: its sha256 is not the one in {MANIFEST}, so it is damaged or another file; remove "
                "it and run the stage that makes it again, or restore it from a copy",
            )
        _CHECKED.add(key)

    def _hashes_named(self) -> dict[str, str]:
        """sha256 of each part by its name, from the present manifest; empty while the data set is incomplete."""
        try:
            state = self._files.state(MANIFEST)
        except FileNotFoundError:
            return {}
        if self._named[0] != state:
            try:
                hashes = {str(part["name"]): str(part["sha256"]) for part in (self.manifest or {"parts": []})["parts"]}
            except (KeyError, TypeError) as error:
                raise UserError("store_damaged", f"{self.url}/{MANIFEST}: damaged; remove it and run again") from error
            self._named = state, hashes
        return self._named[1]

    def clean(self) -> None:
        """Removes what killed writers left. Only the folder's writer may call it."""
        self._files.clean()


def encode(rows: Sequence[dict[str, Any]], schema: pa.Schema, fingerprint: str = "") -> bytes:
    """Rows as one parquet file; equal rows give equal bytes. AssertionError for a row with other columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = set(schema.names)
    for row in rows:
        assert row.keys() == names, f"columns differ from the schema: {sorted(row.keys() ^ names)}"
    metadata = {**(schema.metadata or {}), _FINGERPRINT: fingerprint.encode()}
    table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata(metadata))
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=ROW_GROUP, compression="zstd", use_dictionary=False, version="2.6")
    return out.getvalue()


def part_name(name: Any) -> str:
    """The name of a part from a manifest. UserError for any other name, which could be a path to another place."""
    if not isinstance(name, str) or not _PART.fullmatch(name):
        raise UserError("path_unsafe", f"{str(name)[:80]!r}: not the name of a part, such as part-00000.parquet")
    return name


class _Local:
    """A folder on a local disk. A write is a temporary name, a flush to the disk and a rename."""

    def __init__(self, url: str) -> None:
        self.folder = Path(url)

    def names(self) -> list[str]:
        return [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []

    def source(self, name: str) -> Any:
        return str(inside(self.folder, name))

    def read(self, name: str) -> bytes:
        return inside(self.folder, name).read_bytes()

    def state(self, name: str) -> Any:
        """A value that changes when the file is written again. FileNotFoundError if it does not exist."""
        stat = inside(self.folder, name).stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def sha256(self, name: str) -> str:
        return sha256_file(inside(self.folder, name))

    def put(self, name: str, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / plain_name(name), data)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()

    def clean(self) -> None:
        clean(self.folder)


class _Remote:
    """Any other fsspec file system. A write is one put, which such stores make visible whole or not at all."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        try:
            # Other machines write there too, so listings must not be cached.
            self.fs, self.root = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UsageError(
                "dependency_missing", f"{url}: {error}; for s3:// run: pip install 'diptych[s3]'"
            ) from None

    def names(self) -> list[str]:
        try:
            return [str(path).rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False)]
        except FileNotFoundError:
            return []

    def source(self, name: str) -> Any:
        return self.fs.open(f"{self.root}/{name}", "rb")

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(f"{self.root}/{name}")

    def state(self, name: str) -> Any:
        return self.fs.ukey(f"{self.root}/{name}")

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self.fs.open(f"{self.root}/{name}", "rb", block_size=BLOCK) as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def put(self, name: str, data: bytes) -> None:
        try:
            self.fs.pipe_file(f"{self.root}/{name}", data)
        except OSError as error:
            raise UserError("path_unwritable", f"cannot write {self.root}/{name}: {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        self.fs.rm_file(f"{self.root}/{name}")

    def clean(self) -> None:
        pass


@contextmanager
def reading(place: str, if_missing: str = "", if_damaged: str = "") -> Iterator[None]:
    """Turns errors of opening and reading parquet into a UserError with a remedy: a missing or damaged file."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise UserError("path_not_found", f"{place} is missing{if_missing}") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            "store_damaged", f"{place} is not a readable parquet file ({describe(error)}){if_damaged}"
        ) from error
