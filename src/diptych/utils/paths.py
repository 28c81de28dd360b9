"""Paths: files that ship with diptych, files that users name (local or at an address), and names from other people."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, cast

from diptych.errors import UsageError, UserError

if TYPE_CHECKING:
    from upath import UPath

# The hub's cache stores each file once, under its hash; its model folders link to it.
_BLOB = re.compile(r".*/(models|datasets)--[^/]+/blobs/[0-9a-f]{40,64}")


def packaged(name: str) -> Path:
    """A folder that ships with diptych, such as `pocket/weights`, `recipes` or `examples/references`.

    `examples` and `recipes` are at the repository's root, and inside the package in a wheel. An editable install reads
    them from the root.
    """
    inside = Path(str(files("diptych"))) / name
    checkout = Path(__file__).resolve().parents[3] / name
    return checkout if not inside.exists() and checkout.exists() else inside


def here_or_packaged(path: str | Path) -> Path:
    """`path`, or if it does not exist, the file of that name that ships with diptych. So the documentation's
    `examples/…` and `recipes/…` also work outside a clone."""
    path = Path(path)
    if path.parts[:1] in (("examples",), ("recipes",)) and ".." not in path.parts and not path.exists():
        inside = packaged(path.as_posix())
        return inside if inside.exists() else path
    return path


def is_remote(where: str | Path | UPath) -> bool:
    """Whether it is an address instead of a folder on this machine."""
    return "://" in str(where)


def place(where: str | Path | UPath) -> Path:
    """A folder or file as a path; for an address, fsspec's path, which has pathlib's methods.

    UsageError if the package for such addresses is missing, or if their kind is unknown.
    """
    if not is_remote(where):
        return Path(str(where))
    try:
        from upath import UPath

        # Other machines write there too, so a cached listing may be outdated.
        return cast("Path", UPath(str(where).rstrip("/"), use_listings_cache=False))
    except ImportError as error:
        raise UsageError(
            "dependency_missing",
            f"{where} needs the package {error.name or error}. Install it: pip install 'diptych[s3]'",
        ) from None
    except ValueError as error:
        raise UsageError("option_invalid", f"{where}: {error}. Use an address such as s3://BUCKET/FOLDER.") from None


def make_private(folder: Path) -> None:
    """Makes a folder, and missing ones above it, that only the owner may open. An existing folder stays unchanged."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def private_file(path: Path) -> None:
    """Makes an empty file that only its owner may read, in a private folder. An existing file of this user loses the
    permissions of others. UserError for a link, because the change would apply to its target."""
    make_private(path.parent)
    refuse_link(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        status = os.fstat(descriptor)
        if os.name == "posix" and status.st_mode & 0o077 and status.st_uid == os.getuid():
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


# Names from other people ---------------------------------------------------------------------------------------


def plain_name(name: object) -> str:
    """Checks a relative path from a file or a request: it uses `/` and stays inside the folder that it is joined to.
    UserError for an absolute path, `..`, a drive, a backslash, a control character, or empty text."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(name)[:80])
    if not isinstance(name, str) or not name or not name.isprintable() or "\\" in name:
        raise UserError("path_unsafe", f"'{shown}' is not a file name.")
    windows = PureWindowsPath(name)
    if windows.anchor or ".." in windows.parts:
        raise UserError("path_unsafe", f"'{shown}' leads outside its folder. Only files inside it are read or written.")
    return name


def inside(folder: Path, name: object) -> Path:
    """The file or folder `name` of `folder`, if either comes from somebody else; it need not exist.

    UserError for a name that is not a `plain_name`, and for a link that leads out of the folder, except within the
    hub's cache. Also for a device, a FIFO, or a socket, which could block forever.
    """
    path = folder / plain_name(name)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None  # missing, or a broken link, which a writer would follow
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError("path_unreadable", f"{path}: cannot be read ({reason})") from None
    if mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError("path_unsafe", f"{path}: a device, a FIFO, or a socket instead of a regular file. Remove it.")
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(folder)) and not _BLOB.fullmatch(target.as_posix()):
        raise UserError(
            "path_unsafe",
            f"{path}: a link to {target}, which is outside {folder}. Replace it with the file or folder itself.",
        )
    return path


def files_inside(folder: Path, pattern: str = "**/*") -> Iterator[Path]:
    """The files in a folder from somebody else, sorted. UserError for the first entry that `inside` rejects."""
    for path in sorted(folder.glob(pattern)):
        if inside(folder, path.relative_to(folder).as_posix()).is_file():
            yield path


def refuse_special(path: Path) -> Path:
    """Returns the path. UserError if it is a device, a FIFO, or a socket: reading it could block forever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError("path_unsafe", f"{path}: a device, a FIFO, or a socket instead of a regular file or folder.")
    return path


def refuse_link(path: Path) -> Path:
    """Returns the path, to be written in place. UserError if it is a link, a device, a FIFO, or a socket."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return path
    if not stat.S_ISREG(mode):
        raise UserError("path_unsafe", f"{path}: a link or a special file. Replace it with a regular file.")
    return path
