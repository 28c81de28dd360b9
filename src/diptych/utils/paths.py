"""Where files lie: those that ship with diptych, and those that users name, on this machine or at an address."""

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

# The hub's cache keeps each file once, under its hash, and its folders of models link to it.
_BLOB = re.compile(r".*/(models|datasets)--[^/]+/blobs/[0-9a-f]{40,64}")


def packaged(name: str) -> Path:
    """A folder that ships with diptych, such as `pocket/weights`, `recipes` or `examples/references`.

    `examples` and `recipes` live at the repository's root, where people look for them, and are put inside the package
    when a wheel is built; an editable install finds them at the root.
    """
    inside = Path(str(files("diptych"))) / name
    checkout = Path(__file__).resolve().parents[3] / name
    return checkout if not inside.exists() and checkout.exists() else inside


def here_or_packaged(path: str | Path) -> Path:
    """`path`, or, where nothing is there, what ships with diptych under that name: `examples/…` and `recipes/…`, as the
    documentation writes them, are found outside a clone as well."""
    path = Path(path)
    if path.parts[:1] in (("examples",), ("recipes",)) and ".." not in path.parts and not path.exists():
        inside = packaged(path.as_posix())
        return inside if inside.exists() else path
    return path


def is_remote(where: str | Path | UPath) -> bool:
    """Whether it is an address and not a folder of this machine."""
    return "://" in str(where)


def place(where: str | Path | UPath) -> Path:
    """A folder or a file as a path. For an address it is fsspec's, which has pathlib's methods.

    UsageError if what opens such addresses is not installed, or if there is no such kind.
    """
    if not is_remote(where):
        return Path(str(where))
    try:
        from upath import UPath

        # Other machines write there too: what was listed a moment ago is no longer true.
        return cast("Path", UPath(str(where).rstrip("/"), use_listings_cache=False))
    except ImportError as error:
        raise UsageError(f"{where}: {error.name or error} is not installed; pip install 'diptych[s3]'") from None
    except ValueError as error:
        raise UsageError(f"{where}: {error}; an address is s3://BUCKET/FOLDER, for instance") from None


def make_private(folder: Path) -> None:
    """Makes a folder that only its owner may enter, and those above it that are missing. One that is there stays."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def private_file(path: Path) -> None:
    """Makes an empty file that only its owner may read, in a private folder; takes others' permissions off a file of
    ours that is there. UserError for a link, whose target would be changed instead."""
    make_private(path.parent)
    refuse_link(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        found = os.fstat(descriptor)
        if os.name == "posix" and found.st_mode & 0o077 and found.st_uid == os.getuid():
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


# Names that other people wrote ---------------------------------------------------------------------------------------


def plain_name(name: object) -> str:
    """A relative path that a file or a request names, with `/` between its parts, if it stays inside any folder that it
    is joined to. UserError for an absolute path, `..`, a drive, a backslash, a control character, or no text at all."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(name)[:80])
    if not isinstance(name, str) or not name or not name.isprintable() or "\\" in name:
        raise UserError(f"'{shown}' is not a file name")
    windows = PureWindowsPath(name)
    if windows.anchor or ".." in windows.parts:
        raise UserError(f"'{shown}' lies outside of the folder that names it; only files inside it are read or written")
    return name


def inside(folder: Path, name: object) -> Path:
    """The file or folder `name` of `folder`, where either of them comes from somebody else; it need not exist.

    UserError for a name that is not a `plain_name`, for a link that leads out of the folder (but for those that the
    hub's cache has), and for a device, a FIFO or a socket, which would block or never end.
    """
    path = folder / plain_name(name)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None  # nothing there, or a link to nothing, which a writer would follow
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path}: not a regular file but a device, a FIFO or a socket; remove it")
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(folder)) and not _BLOB.fullmatch(target.as_posix()):
        raise UserError(
            f"{path}: a link to {target}, which lies outside of {folder}; replace it with the file or folder itself"
        )
    return path


def files_inside(folder: Path, pattern: str = "**/*") -> Iterator[Path]:
    """The files in a folder from somebody else, sorted. UserError for the first entry that `inside` refuses."""
    for path in sorted(folder.glob(pattern)):
        if inside(folder, path.relative_to(folder).as_posix()).is_file():
            yield path


def refuse_special(path: Path) -> Path:
    """The path itself. UserError if it is a device, a FIFO or a socket: reading it would block or never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: neither a regular file nor a folder but a device, a FIFO or a socket")
    return path


def refuse_link(path: Path) -> Path:
    """The path itself, to be written in place. UserError if it is a link, a device, a FIFO or a socket."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return path
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: a link or a special file, which is not written to; replace it with a regular file")
    return path
