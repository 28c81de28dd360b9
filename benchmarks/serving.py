"""`diptych serve` in a separate process, for the benchmarks and soak tests."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Python tells this hook of every file that it opens or makes, and of every database; what only reads is left out.
AUDIT = """
import os, sys
said = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MAKES = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.truncate", "sqlite3.connect")
def hook(event, given):
    if event in MAKES or (event == "open" and given[2] & CHANGES):
        os.write(said, f"{{event}} {{given[0]}}\\n".encode("utf8", "backslashreplace"))
sys.addaudithook(hook)
from diptych.cli.app import main
sys.exit(main())
"""


class Server:
    """A server in `folder`, which has its data and its log. It also has its home and temporary folder, so that stray
    files are noticed. `script` is Python code that starts the server in another way than the command. `restart` starts
    it again on the same port. RuntimeError if it ends before it is ready."""

    def __init__(self, folder: Path, *options: str, audited: bool = False, script: str = "") -> None:
        self.folder, self.log = folder, folder / "server.log"
        self.audit = folder / "written.log" if audited else None
        self.script = AUDIT.format(log=str(self.audit)) if audited else script
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.options = ("--port", str(self.port), "--data", str(folder / "data"), *options)
        for name in ("home", "tmp", "cwd"):
            (folder / name).mkdir(parents=True)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        run = ["-c", self.script] if self.script else ["-m", "diptych"]
        places = {"HOME": str(self.folder / "home"), "TMPDIR": str(self.folder / "tmp")}
        self.said = len(self.text())
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *run, "serve", *self.options],
                cwd=self.folder / "cwd",
                env=os.environ | places,
                stdout=log,
                stderr=log,
                text=True,
            )
        while not re.search("^ready: ", self.text()[self.said :], re.MULTILINE):
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"the server ended before it was ready:\n{self.text()[-2000:]}")
        self.started = len(self.audit.read_text(errors="replace").splitlines()) if self.audit else 0
        return process

    def text(self) -> str:
        """Its output so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def restart(self) -> None:
        """Starts it again in the same folder."""
        self.process = self._start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.end()

    def memory(self) -> int:
        """Resident bytes; 0 if the process has ended."""
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def end(self, how: int = signal.SIGTERM) -> int:
        """Ends it; its exit code."""
        self.process.send_signal(how)
        return self.process.wait(120)

    def strays(self, may: Sequence[str] = ()) -> list[str]:
        """Files that it left outside its data folder, and unknown files in it."""
        own = {f"data/jobs.sqlite{end}" for end in ("", "-wal", "-shm")} | {"server.log", "written.log"}
        found = (str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if not path.is_dir())
        return sorted(name for name in found if name not in own and not name.startswith(tuple(may)))
