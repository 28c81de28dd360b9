"""A server in this process on a free port, for tests over the network."""

from __future__ import annotations

import threading
import time
from typing import Any

import uvicorn

from diptych import Student
from diptych.serve import server
from diptych.serve.config import ServerSettings
from diptych.serve.service import Service
from diptych.utils.paths import packaged

CAT = packaged("examples/references") / "cat.png"
TOKENS = {"ana": "ana-0123456789abcdef", "ben": "ben-0123456789abcdef"}


class Running:
    """A server at `url` with its `service`. It uses `student`; without one, each worker loads a student."""

    def __init__(self, settings: ServerSettings, student: Student | None, web_app: bool = False) -> None:
        self.service = Service(settings)
        for worker in self.service.workers if student is not None else ():
            worker.load = lambda: student
        app = server.create(self.service, web_app)
        own: dict[str, Any] = {"port": 0, "log_level": "error", "timeout_graceful_shutdown": 5}
        self.server = uvicorn.Server(server.config(app, settings, **own))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        until = time.monotonic() + 120
        while not (self.server.started and self.service.ready):
            assert self.thread.is_alive() and time.monotonic() < until and self.service.failure is None
            time.sleep(0.02)
        sockets: Any = self.server.servers[0].sockets
        self.port: int = sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Ends as a signal would end it."""
        self.service.drain()
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()
