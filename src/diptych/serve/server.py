"""The HTTP server: the API's routes, health and metrics, login and pages, the web app, and the guard around it all.

run(ServerSettings(folder=Path("serve")))     # until Ctrl-C or SIGTERM
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response

from diptych.errors import UserError
from diptych.serve.auth import COOKIE, SESSION_SECONDS, Authenticator
from diptych.serve.config import Limits, ServerSettings
from diptych.serve.http import error_responses, guard, image_routes, job_routes, pages, relight_routes
from diptych.serve.http import pages as run_files
from diptych.serve.http.guard import APP, RequestGuard, client_of, cookie_of
from diptych.serve.service import Service
from diptych.utils.machine import VERSION

TITLE = "diptych"


def create(service: Service, web_app: bool = True) -> RequestGuard:
    """The ASGI app of a service. The service itself is started and stopped with it."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.board.bind(asyncio.get_running_loop())
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title=TITLE, version=VERSION, docs_url=None, redoc_url=None, openapi_url=None, lifespan=life,
        description="Pictures of your subject, in OpenAI's format.",
    )  # fmt: skip
    app.state.service = service
    gate = Authenticator(service.settings.tokens, service.settings.limits.guesses, service.store)
    error_responses.install(app)
    app.include_router(image_routes.router)
    app.include_router(job_routes.router)
    app.include_router(relight_routes.router)
    if service.runs is not None:
        app.include_router(run_files.router)
    _add_health(app, service)
    _add_pages(app, gate)
    app.openapi = lambda: _schema(app, gate, service.settings.limits)
    inside: Any = app
    if web_app:
        from diptych.serve.app import mount

        inside = mount(app, service)
    return RequestGuard(inside, service.settings, gate, service.metrics)


def _within(schema: dict[str, Any], limits: Limits) -> None:
    """Narrows the fields of requests to what this server allows, so that its pages and errors say that."""
    most = {"steps": ("maximum", limits.steps), "n": ("maximum", limits.pictures)}
    most["prompt"] = ("maxLength", limits.prompt_letters)
    bodies = list(schema["components"]["schemas"].values())
    for methods in schema["paths"].values():
        for route in methods.values():
            bodies += [content["schema"] for content in route.get("requestBody", {}).get("content", {}).values()]
    for body in bodies:
        for name, field in body.get("properties", {}).items():
            key, value = most.get(name, ("", 0))
            for kind in [field, *field.get("anyOf", ())]:
                if key in kind:
                    kind[key] = min(kind[key], value)


def _schema(app: FastAPI, gate: Authenticator, limits: Limits) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        if not gate.open:
            schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"token": []}]
        for path in ("/healthz", "/readyz"):
            schema["paths"][path]["get"]["security"] = []
        _within(schema, limits)
        app.openapi_schema = schema
    return app.openapi_schema


def icon() -> bytes:
    """The page's icon, an SVG."""
    return (files("diptych.serve.app") / "icon.svg").read_bytes()


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["health"], responses=error_responses.documented())
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], responses=error_responses.documented())
    async def readyz() -> dict[str, str]:
        """Whether jobs are taken, stored and drawn; 503 with the reason if not."""
        if (reason := service.unready()) is not None:
            return error_responses.answer(503, reason)  # pyright: ignore
        return {"status": "ready"}

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse, responses=error_responses.documented())
    def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_pages(app: FastAPI, gate: Authenticator) -> None:
    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse(f"{APP}/", 303)

    @app.get(pages.ICON, include_in_schema=False)
    async def favicon() -> Response:
        return Response(icon(), media_type="image/svg+xml", headers={"Cache-Control": "max-age=86400"})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(pages.description(app.openapi()))

    @app.get("/openapi.json", include_in_schema=False)
    async def schema() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get("/login", include_in_schema=False)
    async def login_page() -> HTMLResponse:
        return HTMLResponse(pages.login())

    @app.post("/login", include_in_schema=False)
    async def login(request: Request) -> Response:
        async with request.form(max_files=0, max_fields=4, max_part_size=2**14) as form:
            owner = gate.owner(str(form.get("token", "")).strip())
        if owner is None:
            if seconds := gate.guessed(client_of(request.scope)):
                again = {"Retry-After": str(round(seconds + 0.5))}
                return error_responses.answer(429, "too many wrong tokens", headers=again)
            return HTMLResponse(pages.login(wrong=True), 401)
        response = RedirectResponse(f"{APP}/", 303)
        secure = request.url.scheme == "https"
        response.set_cookie(
            COOKIE, gate.session(owner), SESSION_SECONDS, httponly=True, samesite="strict", secure=secure
        )
        return response

    @app.post("/logout", include_in_schema=False)
    def logout(request: Request) -> Response:
        gate.revoke(cookie_of(request.headers))
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE)
        return response


def config(app: Any, settings: ServerSettings, **more: Any) -> Any:
    """How uvicorn serves the app; `more` are settings of its own."""
    import uvicorn

    from diptych.serve.http.connections import impatient

    given: dict[str, Any] = {
        "http": impatient(settings.limits.head_seconds, settings.limits.connections),
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": 15,
        "timeout_graceful_shutdown": int(settings.grace_seconds) + 5,
        "ws": "none",
        "lifespan": "on",
        "proxy_headers": bool(settings.proxies),  # uvicorn would believe whoever asks from this machine
        "forwarded_allow_ips": list(settings.proxies),
    }
    return uvicorn.Config(app, **given | more)


def run(
    settings: ServerSettings, say: Callable[[str], None] = print, web_app: bool = True, log_level: str = "info"
) -> None:
    """Serves until SIGINT or SIGTERM; the batch in hand is finished first. UserError if the model or the port fails.

    `log_level` is of `diptych.access`, a line for each request, and of all other logs of diptych's and uvicorn's.
    """
    import socket

    import uvicorn

    service = Service(settings)
    kind = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With its protocol named, or asyncio leaves Nagle's delay on: 40 ms an answer.
    listening = socket.socket(kind, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as error:
        raise UserError(
            f"{settings.host}:{settings.port} cannot be used ({error.strerror or error}); choose another --port"
        ) from error
    app = create(service, web_app)

    class Server(uvicorn.Server):
        """Tells the service at once when it is to stop, so that who waits is told too. A second Ctrl-C ends the
        process at once, as a kill would: what was accepted is in the store. uvicorn's own way ends with the signal
        raised once more, as if the process had been killed by it."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            if service.draining and sig == signal.SIGINT:
                say("stopped at once; what was accepted is kept for the next start")
                os._exit(128 + sig)
            if not service.draining:
                say(f"stopping on {signal.Signals(sig).name}: the batch in hand is finished, and what waits is kept")
            service.drain()
            self.should_exit = True

    guard.start(log_level)
    server = Server(config(app, settings, log_level=log_level if log_level == "debug" else "warning"))
    port = listening.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host

    def watch() -> None:
        """Says when the model is there; ends the server if it cannot be."""
        while not service.ready and service.failure is None and not server.should_exit:
            time.sleep(0.1)
        if service.failure is not None:
            server.should_exit = True
        elif service.ready:
            held = (worker.student.pipeline.runtime.memory for worker in service.workers if worker.student is not None)
            for reason in dict.fromkeys(memory.reason for memory in held if memory is not None):
                say(reason)
            say(
                f"ready: http://{host}:{port}"
                + (f"{APP}/ is the app, /v1 the API, /docs its pages" if web_app else "/v1, /docs")
            )

    say(f"listening on http://{host}:{port}, loading {settings.loading['model']}")
    threading.Thread(target=watch, daemon=True).start()
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
        say(f"stopped; {service.left} pictures wait for the next start" if service.left else "stopped")
    if service.failure is not None:
        raise service.failure
