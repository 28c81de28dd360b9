"""The guard of the server: an ASGI middleware around all routes and the web app.

It checks, in this order: the host name (against DNS rebinding), the origin (CORS is closed), and the owner. Then it
checks the routes of the web app's framework, and the size and duration of the body, before anything is decoded.
Responses get security headers.

It also writes the request log (`diptych.access`), one line per request. A line names the owner but never a token, and
only the path of an address, since the query may be a signature. Warnings that quote a prompt are logged only at the
level debug; the client gets them with the response.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse

from diptych.serve.auth import COOKIE, LOCAL, Authenticator
from diptych.serve.config import ServerSettings
from diptych.serve.http import error_responses
from diptych.serve.progress import ServerMetrics
from diptych.utils import documents

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

APP = "/app"
PUBLIC = frozenset({"/healthz", "/readyz", "/login", "/favicon.ico"})
HEALTH = frozenset({"/healthz", "/readyz"})  # answered whatever the number of requests
STRANGERS = 2**16  # bytes of a request without a token
BODIES = 16  # uploads of the largest size that one owner may have in memory
SIGNED = "/v1/pictures/"  # this route checks the signature
LONGEST = 255  # bytes of a path segment: the file systems' limit, since the app's scripts and styles are files
# The routes of Gradio that the app's pages need. Its uploads, file cache, proxy and component server are left out:
# images go through /v1/references and /v1/pictures, which check the owner.
GRADIO = ("queue/join", "queue/data", "heartbeat", "reset", "cancel", "startup-events", "app_id", "info")
CLOSED = (
    "default-src 'none'; img-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; "
    "style-src 'unsafe-inline'"
)
PAGES = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; frame-src 'self'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # no-referrer makes a browser send `Origin: null` with the login form
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def client_of(scope: Mapping[str, Any]) -> str:
    """Returns the client address of a request."""
    return (scope.get("client") or ("?",))[0]


def cookie_of(headers: Headers) -> str:
    """Returns the session cookie, empty if there is none."""
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie is not None else ""


def _ambiguous(headers: Headers) -> Any:
    """A rejection of a body whose end two servers could read differently (request smuggling)."""
    lengths = headers.getlist("content-length")
    if lengths and "transfer-encoding" in headers:
        return error_responses.answer(400, "Send Content-Length or Transfer-Encoding, not both.")
    if len(set(lengths)) > 1 or not all(length.isascii() and length.isdecimal() for length in lengths):
        return error_responses.answer(400, "The header Content-Length must be a whole number of bytes.")
    return None


def _too_large(limit: int) -> str:
    return f"The request is too large. The limit is {documents.size(limit)}."


@dataclass
class _Body:
    """Limit and received bytes of a request's body."""

    limit: int
    count: int = 0


class RequestGuard:
    """The middleware; see the module."""

    def __init__(self, app: Any, settings: ServerSettings, gate: Authenticator, metrics: ServerMetrics) -> None:
        self.app, self.gate, self.metrics = app, gate, metrics
        self.hosts, self.limits = settings.hosts, settings.limits
        self.limit = settings.limits.local_requests if gate.open else settings.limits.requests
        self.active: Counter[str | None] = Counter()  # requests by owner; None: without a token
        self.held: Counter[str | None] = Counter()  # received bytes of their bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, self._counted(scope, send))
        else:  # no page here opens a web socket
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        state = scope.setdefault("state", {})
        state["owner"] = None
        refusal = _ambiguous(headers) or self._foreign(headers, scope["method"])
        if refusal is None:
            state["owner"], refusal = self._owner(scope, headers)
        if refusal is None and path.startswith(f"{APP}/gradio_api/"):
            name = path.removeprefix(f"{APP}/gradio_api/").strip("/")
            if not any(name == known or name.startswith(f"{known}/") for known in GRADIO):
                refusal = error_responses.answer(404, "Page not found.", "request_invalid")
        if refusal is None and any(len(part.encode("utf8", "replace")) > LONGEST for part in path.split("/")):
            refusal = error_responses.answer(404, "Page not found.", "request_invalid")
        owner = state["owner"]
        limit = self.limits.upload_bytes if owner else min(STRANGERS, self.limits.upload_bytes)
        if refusal is None and int(headers.get("content-length", "0")) > limit:
            refusal = error_responses.answer(413, _too_large(limit))
        if refusal is None and self.active[owner] >= self.limit and path not in HEALTH:
            self.metrics.refused.labels("requests").inc()
            busy = f"{self.limit} requests{' of this key' if owner else ''} are in progress. Retry in 5 s."
            refusal = error_responses.answer(503, busy, headers={"Retry-After": "5"})
        if refusal is not None:
            refusal.headers["Connection"] = "close"  # the rest of a body must not be read as the next request
            await refusal(scope, receive, send)
            return
        body = _Body(limit)
        self.active[owner] += 1
        try:
            await self.app(scope, self._limited(receive, owner, body), send)
        finally:
            for counter, number in ((self.active, 1), (self.held, body.count)):
                counter[owner] -= number
                if not counter[owner]:
                    del counter[owner]

    def _foreign(self, headers: Headers, method: str) -> Any:
        """A rejection of a request with another host name, or from a page of another site."""
        host = headers.get("host", "")
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            name = ""
        if not name or (self.hosts is not None and name not in self.hosts):
            return error_responses.answer(421, "Unknown host name. Add it to the server with --name.")
        origin = headers.get("origin")
        if origin is None or method in ("GET", "HEAD"):
            return None
        if urlsplit(origin).netloc.lower() != host.lower():
            return error_responses.answer(403, "Requests from pages of other sites are not allowed.")
        return None

    def _owner(self, scope: Scope, headers: Headers) -> tuple[str | None, Any]:
        """The owner of a request, or a rejection."""
        if self.gate.open:
            return LOCAL, None
        path = scope["path"]
        if path in PUBLIC:
            return None, None
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind:
            owner = self.gate.owner(token.strip()) if kind.lower() == "bearer" else None
            if owner is None and (seconds := self.gate.guessed(client_of(scope))):
                self.metrics.refused.labels("guesses").inc()
                return None, too_many_guesses(seconds)
        else:
            owner = self.gate.of_session(cookie_of(headers))
        if owner is not None or path.startswith(SIGNED):
            return owner, None
        self.metrics.refused.labels("token").inc()
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            return None, RedirectResponse("/login", 303)
        wrong = "Unknown token." if kind else "A token is required. Send the header Authorization: Bearer TOKEN."
        return None, error_responses.answer(401, wrong, headers={"WWW-Authenticate": "Bearer"})

    def _limited(self, receive: Receive, owner: str | None, body: _Body) -> Receive:
        """Counts and times the body as it arrives."""
        loop = asyncio.get_running_loop()
        until, whole = loop.time() + self.limits.body_seconds, False

        async def limited() -> MutableMapping[str, Any]:
            nonlocal whole
            if whole:  # the next message only reports that the client left
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - loop.time()))
            except TimeoutError:
                limit = f"{self.limits.body_seconds:g} s"
                raise HTTPException(408, f"The body of the request took longer than {limit}.") from None
            size = len(message.get("body", b""))
            body.count += size
            self.held[owner] += size
            whole = not message.get("more_body", False)
            if body.count > body.limit:
                raise HTTPException(413, _too_large(body.limit))
            if self.held[owner] > BODIES * self.limits.upload_bytes:
                raise HTTPException(503, "Too many bytes are being uploaded. Retry in 5 s.", {"Retry-After": "5"})
            return message

        return limited

    def _counted(self, scope: Scope, send: Send) -> Send:
        """Adds headers to the response, counts it by route, and logs it."""
        path, started = scope["path"], time.monotonic()

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]  # Gradio would allow some pages of other sites
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Content-Security-Policy", PAGES if path.startswith(APP) else CLOSED)
                if not path.startswith((f"{APP}/assets", f"{APP}/static", f"{APP}/_app", SIGNED)):
                    headers.setdefault("Cache-Control", "no-store")
                route = getattr(scope.get("route"), "path", None) or (APP if path.startswith(APP) else "other")
                self.metrics.requests.labels(route, str(message["status"])).inc()
                client, owner = (scope.get("client") or ("-",))[0], scope.get("state", {}).get("owner")
                _log_request(client, owner, scope["method"], path, message["status"], time.monotonic() - started)
            await send(message)

        return counted


def too_many_guesses(seconds: float) -> Any:
    """Returns the response to a client that tried too many wrong tokens."""
    wait = round(seconds + 0.5)
    return error_responses.answer(429, f"Too many wrong tokens. Retry in {wait} s.", headers={"Retry-After": str(wait)})


access = logging.getLogger("diptych.access")
QUIET = ("/healthz", "/readyz", "/metrics", "/app/")  # frequent requests, logged only at the level debug


def start_log(level: str) -> None:
    """Logs records of at least this level to stderr, one line each with its time. Call once per process."""
    logger = logging.getLogger("diptych")
    logger.setLevel(level.upper())
    for handler in list(logger.handlers):  # the command line's, which writes no times
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    if level != "debug":
        handler.addFilter(lambda record: not hasattr(record, "quotes"))  # set on warnings that quote a prompt


def _log_request(client: str, owner: str | None, method: str, path: str, status: int, seconds: float) -> None:
    level = logging.DEBUG if path.startswith(QUIET) and status < 400 else logging.INFO
    if access.isEnabledFor(level):
        escaped = quote(path, safe="/:@!$&'()*+,;=~-._")  # no line breaks or terminal colors in a log
        access.log(
            level, "%s %s %s %s %d %.0f ms", client, owner or "-", method[:16], escaped[:300], status, 1e3 * seconds
        )
