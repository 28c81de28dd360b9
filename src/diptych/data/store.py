"""A data set is a folder: `part-00000.parquet`, `part-00001.parquet`, … and, last, `manifest.json`.

A part is published whole (a temporary name and a rename on a local disk, one put elsewhere: object stores have no
rename, and make a put visible at once), so a process killed at any moment leaves only whole parts. The manifest comes
last and says that nothing is missing. Each part carries the fingerprint of what made it; a part with another one is
refused, never mixed in. The bytes hold no time, host or path: the same rows make the same file.

Rows that are read are first held against the sha256 that the manifest names for their part, once for each part and
process, so that no stage, training or evaluation works on damaged or swapped files. Single columns and rows, which
statistics and pages read, are not.

Any fsspec URL works (`memory://`, `s3://`, …). One writer at a time per folder: `run.py` holds the lock.
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
BLOCK = 8 * 2**20  # bytes of a file at an address that are read at once for its hash
ROW_GROUP = 100  # rows; what the hub's viewer wants of image data
_PART = re.compile(r"part-(\d{5,})\.parquet")
_FINGERPRINT = b"diptych.fingerprint"
_CHECKED: set[tuple[str, str, Any]] = set()  # part, sha256 and state of the files that this process has found whole


class Dataset:
    """A sharded parquet folder. `schema` may be left out to read; it is then the parts' own.

    Rows are dicts; an image is `{"bytes": …, "path": …}`.
    """

    def __init__(self, url: str | Path, schema: pa.Schema | None = None) -> None:
        self.url = str(url).rstrip("/")
        self.schema = schema
        self._hashes: dict[int, str] = {}
        self._named: tuple[Any, dict[str, str]] = (None, {})  # the manifest's state, and the hashes it names
        self._files = _Remote(self.url) if is_remote(self.url) else _Local(self.url)

    def __repr__(self) -> str:
        return f"Dataset({self.url!r})"

    # ---- parts

    def part_name(self, shard: int) -> str:
        """The file name of a shard."""
        return f"part-{shard:05d}.parquet"

    def shards(self) -> list[int]:
        """The numbers of the parts that are there, in order."""
        return sorted(int(m[1]) for name in self._files.names() if (m := _PART.fullmatch(name)))

    def shards_done(self, fingerprint: str | None = None) -> set[int]:
        """The shards that are published. With `fingerprint`, a part made by anything else raises UserError."""
        done = self.shards()
        if fingerprint is not None:
            for shard in done:
                found = self.part_fingerprint(shard)
                if found != fingerprint:
                    raise UserError(
                        f"{self.url}/{self.part_name(shard)} was made by other settings, inputs or weights than this "
                        f"run's (fingerprint {found[:12] or 'missing'}, wanted {fingerprint[:12]}); "
                        f"remove {self.url} to make it again, or choose another --out"
                    )
        return set(done)

    def part_fingerprint(self, shard: int) -> str:
        """The fingerprint stored in a part, `""` if none."""
        with self.open_part(shard) as part:
            return (part.schema_arrow.metadata or {}).get(_FINGERPRINT, b"").decode()

    def write_shard(self, shard: int, rows: Sequence[dict[str, Any]], fingerprint: str = "") -> None:
        """Publishes a shard whole, replacing one of the same number. Columns must be exactly the schema's."""
        assert self.schema is not None, "a data set that is written needs its schema"
        data = encode(rows, self.schema, fingerprint)
        self._files.put(self.part_name(shard), data)
        self._hashes[shard] = sha256(data)

    def drop_shard(self, shard: int) -> None:
        """Removes a shard if it is there."""
        self._hashes.pop(shard, None)
        if shard in self.shards():
            self._files.remove(self.part_name(shard))

    def read_shard(self, shard: int) -> list[dict[str, Any]]:
        """All rows of a shard. UserError if the part is missing or not readable."""
        self.check(shard)
        with self._reading(shard), self.open_part(shard) as part:
            return part.read().to_pylist()

    def rows_in(self, shard: int) -> int:
        """How many rows a shard has, from its footer alone."""
        with self.open_part(shard) as part:
            return part.metadata.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Rows in shard order, a row group at a time: memory stays flat."""
        for shard in self.shards():
            self.check(shard)
            with self._reading(shard), self.open_part(shard) as part:
                for batch in part.iter_batches(ROW_GROUP):
                    yield from batch.to_pylist()

    def __len__(self) -> int:
        return sum(self.rows_in(shard) for shard in self.shards())

    def columns(self, *names: str) -> list[dict[str, Any]]:
        """All rows, but only these columns: reads no picture that is not asked for."""
        rows: list[dict[str, Any]] = []
        for shard in self.shards():
            with self._reading(shard), self.open_part(shard) as part:
                rows += part.read(columns=list(names)).to_pylist()
        return rows

    def open_part(self, shard: int) -> pq.ParquetFile:
        """A part as pyarrow's reader, to be closed; UserError if it is missing or damaged."""
        import pyarrow.parquet as pq

        with self._reading(shard):
            part = pq.ParquetFile(self._files.source(self.part_name(shard)))
        if self.schema is None:
            own = part.schema_arrow
            metadata = {k: v for k, v in (own.metadata or {}).items() if k != _FINGERPRINT}
            self.schema = own.with_metadata(metadata or None)
        return part

    def _reading(self, shard: int) -> AbstractContextManager[None]:
        again = "; run the stage that makes it again", "; remove it and run again"
        return reading(f"{self.url}/{self.part_name(shard)}", *again)

    # ---- files as they are

    def names(self) -> list[str]:
        """The names of all files of the folder."""
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
        """What `publish` wrote, or None while the data set is unfinished."""
        try:
            text = self._files.read(MANIFEST)
        except FileNotFoundError:
            return None
        try:
            return parse_json(text)
        except ValueError as error:
            raise UserError(f"{self.url}/{MANIFEST} is not valid JSON; remove it and run again") from error

    def manifest_hash(self) -> str:
        """sha256 of the manifest file: names the data set's whole content. Raises UserError while unfinished."""
        try:
            return sha256(self._files.read(MANIFEST))
        except FileNotFoundError:
            raise UserError(f"{self.url} is not complete; run the stage that makes it first") from None

    def fingerprint(self) -> str:
        """What the parts hold: sha256 over the manifest's hashes of them. UserError while unfinished."""
        manifest = self.manifest
        if manifest is None or not self.is_complete():
            raise UserError(f"{self.url} is not complete; run the stage that makes it first")
        return sha256_json([part["sha256"] for part in manifest["parts"]])

    def publish(self, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
        """Writes the manifest, last: `manifest`'s own keys, then counts and the sha256 of every part."""
        parts = []
        for shard in self.shards():
            if shard not in self._hashes:
                self._hashes[shard] = sha256(self._files.read(self.part_name(shard)))
            parts.append({"name": self.part_name(shard), "rows": self.rows_in(shard), "sha256": self._hashes[shard]})
        whole = {"format": FORMAT, **(manifest or {}), "rows": sum(p["rows"] for p in parts), "parts": parts}
        self._files.put(MANIFEST, (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode())
        return whole

    def unpublish(self) -> None:
        """Removes the manifest: the data set is unfinished again."""
        if MANIFEST in self._files.names():
            self._files.remove(MANIFEST)

    def is_complete(self, fingerprint: str | None = None) -> bool:
        """Whether a manifest is there (of `fingerprint`, if given) with every part it names."""
        manifest = self.manifest
        if manifest is None or (fingerprint is not None and manifest.get("fingerprint") != fingerprint):
            return False
        return {part["name"] for part in manifest["parts"]} == {self.part_name(shard) for shard in self.shards()}

    def verify(self) -> None:
        """`check` for every part that the manifest names."""
        for name in self._hashes_named():
            if found := _PART.fullmatch(name):
                self.check(int(found[1]))

    def check(self, shard: int) -> None:
        """Compares a part's sha256 with the manifest's, once in this process while the file stays as it is.

        UserError if it differs or the part is missing. Parts of an unfinished data set have no hash yet and pass.
        """
        name = self.part_name(shard)
        wanted = self._hashes_named().get(name)
        if wanted is None:
            return
        with self._reading(shard):
            key = (f"{self.url}/{name}", wanted, self._files.state(name))
            if key in _CHECKED:
                return
            found = self._files.sha256(name)
        if found != wanted:
            raise UserError(
                f"{self.url}/{name} is damaged or another file (its sha256 differs from the one in {MANIFEST}); remove "
                "it and run again what made it, or restore it from a copy"
            )
        _CHECKED.add(key)

    def _hashes_named(self) -> dict[str, str]:
        """The sha256 of each part by its name, of the manifest as it is now; empty while unfinished."""
        try:
            state = self._files.state(MANIFEST)
        except FileNotFoundError:
            return {}
        if self._named[0] != state:
            try:
                hashes = {str(part["name"]): str(part["sha256"]) for part in (self.manifest or {"parts": []})["parts"]}
            except (KeyError, TypeError) as error:
                raise UserError(f"{self.url}/{MANIFEST} is damaged; remove it and run again") from error
            self._named = state, hashes
        return self._named[1]

    def clean(self) -> None:
        """Removes what killed writers left behind. Only the folder's one writer may call it."""
        self._files.clean()


def encode(rows: Sequence[dict[str, Any]], schema: pa.Schema, fingerprint: str = "") -> bytes:
    """Rows as one parquet file, the same bytes for the same rows. A row with other columns is an AssertionError."""
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
    """The name of a part as a manifest has it. UserError for any other name: it would be a path to somewhere else."""
    if not isinstance(name, str) or not _PART.fullmatch(name):
        raise UserError(f"{str(name)[:80]!r} is not the name of a part, such as part-00000.parquet")
    return name


class _Local:
    """A folder on a local disk: a write is a temporary name, a flush to the disk and a rename."""

    def __init__(self, url: str) -> None:
        self.folder = Path(url)

    def names(self) -> list[str]:
        return [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []

    def source(self, name: str) -> Any:
        return str(inside(self.folder, name))

    def read(self, name: str) -> bytes:
        return inside(self.folder, name).read_bytes()

    def state(self, name: str) -> Any:
        """What changes when a file is written again. FileNotFoundError if it is not there."""
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
    """Any other fsspec file system: a write is one put, which such stores make visible whole or not at all."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        try:
            # Other machines write there too: what was listed a moment ago is no longer true.
            self.fs, self.root = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{url}: {error}; for s3:// addresses: pip install 'diptych[s3]'") from None

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
            raise UserError(f"cannot write {self.root}/{name}: {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        self.fs.rm_file(f"{self.root}/{name}")

    def clean(self) -> None:
        pass


@contextmanager
def reading(place: str, if_missing: str = "", if_damaged: str = "") -> Iterator[None]:
    """Where parquet is opened or read: UserError, with what to do, if the file is missing, or damaged anywhere."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{place} is missing{if_missing}") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{place} is not a readable parquet file ({describe(error)}){if_damaged}") from error
