"""Where files lie: those that ship with diptych, and those that users name, on this machine or at an address."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, cast

from diptych.errors import UsageError

if TYPE_CHECKING:
    from upath import UPath


def packaged(name: str) -> Path:
    """A folder that ships with diptych, such as `pocket/weights`, `recipes` or `examples/references`.

    `examples` and `recipes` live at the repository's root, where people look for them, and are put inside the package
    when a wheel is built; an editable install finds them at the root.
    """
    inside = Path(str(files("diptych"))) / name
    checkout = Path(__file__).resolve().parents[2] / name
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
    ours that is there."""
    make_private(path.parent)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    found = path.stat()
    if os.name == "posix" and found.st_mode & 0o077 and found.st_uid == os.getuid():
        path.chmod(0o600)
