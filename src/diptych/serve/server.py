"""The HTTP server: the API, its pages and the web app behind one guard, in uvicorn with limits on connections.

run(ServerSettings(folder=Path("serve")))     # until Ctrl-C or SIGTERM
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from diptych.errors import UserError
from diptych.serve.auth import Authenticator
from diptych.serve.config import ServerSettings
from diptych.serve.http import error_responses, guard, image_routes, job_routes, openapi, pages
from diptych.serve.http.guard import APP, RequestGuard
from diptych.serve.service import Service
from diptych.utils.machine import VERSION

TITLE = "diptych"


def create(service: Service, web_app: bool = True) -> RequestGuard:
    """Returns the ASGI app of a service, which starts and stops the service."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.board.bind(asyncio.get_running_loop())
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title=TITLE, version=VERSION, docs_url=None, redoc_url=None, openapi_url=None, lifespan=life,
        description="Images of your subject, in OpenAI's format. Every error has a stable code.",
    )  # fmt: skip
    app.state.service = service
    gate = Authenticator(service.settings.tokens, service.settings.limits.guesses, service.store)
    error_responses.install(app)
    app.include_router(image_routes.router)
    app.include_router(job_routes.router)
    app.include_router(image_routes.relight_router)
    if service.runs is not None:
        app.include_router(pages.run_router)
    _add_health(app, service)
    pages.add(app, gate)
    app.openapi = lambda: openapi.schema(app, gate.open, service.settings.limits)
    inside: Any = app
    if web_app:
        from diptych.serve.app import mount

        inside = mount(app, service)
    return RequestGuard(inside, service.settings, gate, service.metrics)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["health"], responses=error_responses.documented())
    async def healthz() -> dict[str, str]:
        """Reports that the process is alive."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], responses=error_responses.documented())
    async def readyz() -> dict[str, str]:
        """Reports whether jobs are accepted, stored and run; 503 with the reason if not."""
        if (reason := service.unready()) is not None:
            return error_responses.answer(503, reason)  # pyright: ignore
        return {"status": "ready"}

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse, responses=error_responses.documented())
    def metrics() -> Response:
        """Returns the counters in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def config(app: Any, settings: ServerSettings, **more: Any) -> Any:
    """Returns uvicorn's configuration; `more` overrides its settings."""
    import uvicorn

    defaults: dict[str, Any] = {
        "http": limited_protocol(settings.limits.head_seconds, settings.limits.connections),
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": 15,
        "timeout_graceful_shutdown": int(settings.grace_seconds) + 5,
        "ws": "none",
        "lifespan": "on",
        "proxy_headers": bool(settings.proxies),  # by default uvicorn trusts any client on this machine
        "forwarded_allow_ips": list(settings.proxies),
    }
    return uvicorn.Config(app, **defaults | more)


def run(
    settings: ServerSettings, say: Callable[[str], None] = print, web_app: bool = True, log_level: str = "info"
) -> None:
    """Serves until SIGINT or SIGTERM, then finishes the running batch. UserError if the model or the port fails.

    `log_level` applies to `diptych.access`, which has a line for each request, and to the other logs of diptych and
    uvicorn.
    """
    import socket

    import uvicorn

    service = Service(settings)
    kind = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is explicit, since otherwise asyncio leaves Nagle's algorithm on, which costs 40 ms per response.
    listening = socket.socket(kind, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as error:
        where, reason = f"{settings.host}:{settings.port}", error.strerror or error
        raise UserError("port_unavailable", f"{where} cannot be opened ({reason}). Choose another --port.") from error
    app = create(service, web_app)

    class Server(uvicorn.Server):
        """Stops the service at the first signal, so that waiting clients get a response.

        A second Ctrl-C ends the process at once, which is safe: accepted jobs are stored. uvicorn's handler would raise
        the signal again at the end.
        """

        def handle_exit(self, sig: int, frame: Any) -> None:
            if service.draining and sig == signal.SIGINT:
                say("stopped at once; accepted jobs resume at the next start")
                os._exit(128 + sig)
            if not service.draining:
                say(f"stopping on {signal.Signals(sig).name}: the running batch finishes, queued jobs are kept")
            service.drain()
            self.should_exit = True

    guard.start_log(log_level)
    server = Server(config(app, settings, log_level=log_level if log_level == "debug" else "warning"))
    port = listening.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host

    def watch() -> None:
        """Reports when the model is loaded; ends the server if that fails."""
        while not service.ready and service.failure is None and not server.should_exit:
            time.sleep(0.1)
        if service.failure is not None:
            server.should_exit = True
        elif service.ready:
            presets = (worker.student.pipeline.runtime.memory for worker in service.workers if worker.student)
            for reason in dict.fromkeys(memory.reason for memory in presets if memory is not None):
                say(reason)
            places = f"{APP}/ is the web app, /v1 the API, /docs its description" if web_app else "/v1, /docs"
            say(f"ready: http://{host}:{port}{places}")

    say(f"listening on http://{host}:{port}, loading {settings.loading['model']}")
    threading.Thread(target=watch, daemon=True).start()
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
        say(f"stopped; {service.left} images are queued for the next start" if service.left else "stopped")
    if service.failure is not None:
        raise service.failure


FILES = 200  # files that the process opens in addition to its connections
STALLED = 60.0  # seconds in which a client must read a part of its response


def limited_protocol(seconds: float, limit: int) -> type[asyncio.Protocol]:
    """Returns uvicorn's HTTP protocol with `seconds` to send a head and at most `limit` connections.

    Beyond the limit, the connection that was idle longest is closed. Requests in progress are not interrupted.
    """
    protocol: Any = AutoHTTPProtocol
    limit = min(limit, _files(limit + FILES) - FILES)

    class LimitedProtocol(protocol):
        late: asyncio.TimerHandle | None = None  # fires unless a head arrives before
        unread: asyncio.TimerHandle | None = None  # fires unless a part of the response is read before
        since = 0.0  # time of the last data

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.since = self.loop.time()
            self._watch()
            if len(self.connections) > limit:
                idle = [other for other in self.connections if other.idle]
                min(idle, key=lambda other: other.since, default=self).transport.abort()

        def data_received(self, data: bytes) -> None:
            self.since = self.loop.time()
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._rest()
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._still_reads(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            if self.unread is not None:
                self.unread.cancel()
                self.unread = None
            super().resume_writing()

        def _still_reads(self, left: int) -> None:
            def check() -> None:
                if self.transport.get_write_buffer_size() >= left:
                    self.transport.abort()
                else:
                    self._still_reads(self.transport.get_write_buffer_size())

            self.unread = self.loop.call_later(STALLED, check)

        @property
        def idle(self) -> bool:
            """Whether the server waits for the client."""
            return self.cycle is None or self.cycle.response_complete

        def _watch(self) -> None:
            """Starts the timer where a head is due. Between two requests, uvicorn's keep-alive timer runs."""
            if not self.idle:
                self._rest()
            elif self.late is None:
                self.late = self.loop.call_later(seconds, self.transport.close)

        def _rest(self) -> None:
            if self.late is not None:
                self.late.cancel()
                self.late = None

    return LimitedProtocol


def _files(wanted: int) -> int:
    """Raises the limit of open files to `wanted` where that is allowed, and returns the limit."""
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (OSError, ValueError):
        return soft
    return raised
