"""What a server writes to stderr: a line for each request (`diptych.access`), and diptych's own warnings and errors.

A line names the owner, never a token; of an address only its path, since what follows may be a signature. Warnings
that quote a prompt are written at the level debug alone; who asked gets them with the answer.
"""

from __future__ import annotations

import logging
import sys
from urllib.parse import quote

LEVELS = ("debug", "info", "warning", "error")
access = logging.getLogger("diptych.access")
QUIET = ("/healthz", "/readyz", "/metrics", "/app/")  # asked all the time: a line at the level debug alone


class _Lines(logging.StreamHandler):
    """A record as one line with its time."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))


def start(level: str) -> None:
    """Writes what is at least of this level; once in a process."""
    logger = logging.getLogger("diptych")
    logger.setLevel(level.upper())
    for handler in logger.handlers:  # the command line's, which has no times
        logger.removeHandler(handler)
    lines = _Lines()
    logger.addHandler(lines)
    if level != "debug":
        lines.addFilter(lambda record: not hasattr(record, "quotes"))  # marks warnings that quote a prompt


def request(client: str, owner: str | None, method: str, path: str, status: int, seconds: float) -> None:
    """A request that was answered."""
    level = logging.DEBUG if path.startswith(QUIET) and status < 400 else logging.INFO
    if access.isEnabledFor(level):
        place = quote(path, safe="/:@!$&'()*+,;=~-._")  # no line breaks and no colours in a log
        access.log(
            level, "%s %s %s %s %d %.0f ms", client, owner or "-", method[:16], place[:300], status, 1e3 * seconds
        )
