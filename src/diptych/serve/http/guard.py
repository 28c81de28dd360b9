"""What stands between strangers and the server: an ASGI middleware around everything, the web app included.

In this order: the name the request is addressed to (a page elsewhere whose name was pointed here gets nothing), its
origin (CORS is closed), whose it is, what of the web app's framework may be reached at all, and the size and the
patience of its body, which are limits before anything is decoded. Answers get the headers that browsers obey.

The log of requests is written here too: a line for each (`diptych.access`) names the owner, never a token, and of an
address only its path, since what follows may be a signature. Warnings that quote a prompt are written at the level
debug alone; who asked gets them with the answer.
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
HEALTH = frozenset({"/healthz", "/readyz"})  # answered at once, however many requests there are
STRANGERS = 2**16  # bytes of a request of somebody who has shown no token
BODIES = 16  # uploads of the largest size that one owner may have in memory
SIGNED = "/v1/pictures/"  # the route itself looks at the signature
LONGEST = 255  # bytes of a part of a path: the file systems' limit, and the app's scripts and styles are files
# Of Gradio's own routes, those that the app's pages need. Its uploads, its file cache, its proxy and its component
# server are not among them: pictures go through /v1/references and /v1/pictures, which know whose they are.
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
    "Referrer-Policy": "same-origin",  # no-referrer makes a browser send `Origin: null` with our own login form
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def client_of(scope: Mapping[str, Any]) -> str:
    """The address that a request comes from."""
    return (scope.get("client") or ("?",))[0]


def cookie_of(headers: Headers) -> str:
    """The session's cookie, empty if there is none."""
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie is not None else ""


def _ambiguous(headers: Headers) -> Any:
    """A refusal for a body whose end two servers could see at two places, so that one reads the rest as a request."""
    lengths = headers.getlist("content-length")
    if lengths and "transfer-encoding" in headers:
        return error_responses.answer(400, "send Content-Length or Transfer-Encoding, not both")
    if len(set(lengths)) > 1 or not all(length.isascii() and length.isdecimal() for length in lengths):
        return error_responses.answer(400, "the header Content-Length must be a whole number of bytes")
    return None


def _too_large(most: int) -> str:
    return f"the request is too large; at most {documents.size(most)} are allowed"


@dataclass
class _Body:
    """How much of a request's body may come, and how much has."""

    most: int
    count: int = 0


class RequestGuard:
    """See the module."""

    def __init__(self, app: Any, settings: ServerSettings, gate: Authenticator, metrics: ServerMetrics) -> None:
        self.app, self.gate, self.metrics = app, gate, metrics
        self.hosts, self.limits = settings.hosts, settings.limits
        self.most = settings.limits.local_requests if gate.open else settings.limits.requests
        self.active: Counter[str | None] = Counter()  # requests by owner; None: of those who have shown no token
        self.held: Counter[str | None] = Counter()  # bytes of bodies that have come for them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, self._counted(scope, send))
        else:  # no page of ours opens a web socket
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
                refusal = error_responses.answer(404, "there is no such page")
        if refusal is None and any(len(part.encode("utf8", "replace")) > LONGEST for part in path.split("/")):
            refusal = error_responses.answer(404, "there is no such page")
        owner = state["owner"]
        most = self.limits.upload_bytes if owner else min(STRANGERS, self.limits.upload_bytes)
        if refusal is None and int(headers.get("content-length", "0")) > most:
            refusal = error_responses.answer(413, _too_large(most))
        if refusal is None and self.active[owner] >= self.most and path not in HEALTH:
            self.metrics.refused.labels("requests").inc()
            said = f"{self.most} requests are being answered already" + (" for this key" if owner else "")
            refusal = error_responses.answer(503, said, code="unavailable", headers={"Retry-After": "5"})
        if refusal is not None:
            refusal.headers["Connection"] = "close"  # what is left of a body must not be read as the next request
            await refusal(scope, receive, send)
            return
        body = _Body(most)
        self.active[owner] += 1
        try:
            await self.app(scope, self._limited(receive, owner, body), send)
        finally:
            for counter, number in ((self.active, 1), (self.held, body.count)):
                counter[owner] -= number
                if not counter[owner]:
                    del counter[owner]

    def _foreign(self, headers: Headers, method: str) -> Any:
        """A refusal for what is addressed to another name than ours, or comes from a page elsewhere."""
        host = headers.get("host", "")
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            name = ""
        if not name or (self.hosts is not None and name not in self.hosts):
            return error_responses.answer(421, "this server does not go by that name (--name adds one)")
        origin = headers.get("origin")
        if origin is None or method in ("GET", "HEAD"):
            return None
        if urlsplit(origin).netloc.lower() != host.lower():
            return error_responses.answer(403, "pages of other sites may not ask this server")
        return None

    def _owner(self, scope: Scope, headers: Headers) -> tuple[str | None, Any]:
        """Whose a request is, or a refusal."""
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
                again = {"Retry-After": str(round(seconds + 0.5))}
                return None, error_responses.answer(429, "too many wrong tokens", headers=again)
        else:
            owner = self.gate.of_session(cookie_of(headers))
        if owner is not None or path.startswith(SIGNED):
            return owner, None
        self.metrics.refused.labels("token").inc()
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            return None, RedirectResponse("/login", 303)
        said = "this token is not known here" if kind else "a token is needed: Authorization: Bearer TOKEN"
        return None, error_responses.answer(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _limited(self, receive: Receive, owner: str | None, body: _Body) -> Receive:
        """The body, counted and timed as it comes."""
        loop = asyncio.get_running_loop()
        until, whole = loop.time() + self.limits.body_seconds, False

        async def limited() -> MutableMapping[str, Any]:
            nonlocal whole
            if whole:  # what comes now is only the news that the client left
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - loop.time()))
            except TimeoutError:
                raise HTTPException(408, "the body of the request came too slowly") from None
            size = len(message.get("body", b""))
            body.count += size
            self.held[owner] += size
            whole = not message.get("more_body", False)
            if body.count > body.most:
                raise HTTPException(413, _too_large(body.most))
            if self.held[owner] > BODIES * self.limits.upload_bytes:
                raise HTTPException(503, "too much is being uploaded at a time", {"Retry-After": "5"})
            return message

        return limited

    def _counted(self, scope: Scope, send: Send) -> Send:
        """Adds the headers, and counts the answer under its route."""
        path, started = scope["path"], time.monotonic()

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]  # Gradio would let some pages elsewhere in
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Content-Security-Policy", PAGES if path.startswith(APP) else CLOSED)
                if not path.startswith((f"{APP}/assets", f"{APP}/static", f"{APP}/_app", SIGNED)):
                    headers.setdefault("Cache-Control", "no-store")
                route = getattr(scope.get("route"), "path", None) or (APP if path.startswith(APP) else "other")
                self.metrics.requests.labels(route, str(message["status"])).inc()
                client, owner = (scope.get("client") or ("-",))[0], scope.get("state", {}).get("owner")
                request(client, owner, scope["method"], path, message["status"], time.monotonic() - started)
            await send(message)

        return counted


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
