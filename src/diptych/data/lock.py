"""One writer at a time: a lock on a folder that the system drops with its holder, so a kill leaves nothing to clear."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diptych.data.places import desk
from diptych.errors import UserError
from diptych.utils.paths import refuse_link


@contextmanager
def lock(place: Path) -> Iterator[None]:
    """Keeps every other process out of a folder, which is made if need be. UserError if one is already in.

    Nothing can be locked at an address: there it keeps out this machine's other processes.
    """
    folder = desk(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror or error})") from error
    try:
        stream = refuse_link(folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from error
    with stream:
        if not _take(stream.fileno()):
            stream.seek(0)
            holder = stream.read().strip()
            raise UserError(
                f"another diptych{f' (process {holder})' if holder else ''} is writing {place}; "
                "wait for it to end, or choose another folder"
            )
        stream.seek(0)
        stream.truncate()
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def _take(descriptor: int) -> bool:
    """A lock that the system drops when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: its own lock, on the first byte
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
            return True
        except OSError:
            return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
