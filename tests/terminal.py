"""A command on a real terminal, typed to by a test."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def on_terminal(
    command: list[str],
    react: Callable[[str], str | None] = lambda _: None,
    columns: int = 80,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Runs a command on a pseudo terminal. Returns its exit code and all it printed, with stdout and stderr in order.

    `react` gets what was printed since it last typed, and returns what to type now, if anything.
    """
    import fcntl
    import pty
    import termios

    pid, leader = pty.fork()
    if pid == 0:
        os.chdir(cwd or ".")
        os.environ.pop("COLUMNS", None)
        os.environ |= {"TERM": "xterm-256color"} | dict(environment or {})
        os.execv(command[0], command)
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    shown, new = "", ""
    try:
        while chunk := os.read(leader, 65536).decode(errors="replace"):
            shown, new = shown + chunk, new + chunk
            if (typed := react(new)) is not None:
                os.write(leader, typed.encode())
                new = ""
    except OSError:
        pass  # the end of a pseudo terminal
    os.close(leader)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown
