"""The web app: a Gradio page with a tab for each kind of job, at the server's address and behind its guard.

A tab is a function that adds components to `gr.Blocks` for a `Service`; `tabs` lists them. Images never pass through
Gradio: the page sends them to /v1/references and shows them from /v1/pictures, which check the owner, so Gradio's file
cache stays empty.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Container, MutableMapping
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from diptych.errors import UsageError
from diptych.serve.auth import LOCAL
from diptych.serve.http import error_responses
from diptych.serve.http.guard import APP, Receive, Scope, Send
from diptych.serve.service import Service
from diptych.utils.documents import parse_request

SESSIONS = 256  # latest open pages whose state is kept: over 100 KB each, and Gradio never drops one
Tab = Callable[[Any, Service], None]  # (the gr.Blocks it is in, the service)


def tabs(service: Service) -> dict[str, Tab]:
    """Returns the tabs by name, in order."""
    from diptych.serve.app import image_tabs, run_tabs

    shown: dict[str, Tab] = {
        "Create": image_tabs.add_create,
        "Relight": image_tabs.add_relight,
        "Story": image_tabs.add_story,
    }
    if service.runs is not None:
        shown |= {"Data": run_tabs.add_data, "Runs": run_tabs.add_runs}
    return shown


def mount(app: Any, service: Service) -> Any:
    """Mounts the web app under /app of the FastAPI app, and returns the ASGI app."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    import gradio as gr

    # Tabs wrap, so that a phone shows all of them.
    page: Any = gr.Blocks(title="diptych", analytics_enabled=False, fill_width=False)
    with page as blocks, gr.Tabs(overflow_behavior="wrap"):
        for name, add in tabs(service).items():
            with gr.Tab(name, id=name.lower(), elem_id=f"tab-{name.lower()}"):
                add(blocks, service)
    blocks.queue(api_open=False, max_size=200)
    blocks.state_session_capacity = SESSIONS
    blocks._queue.pending_messages_per_session.max_size = SESSIONS
    mounted = gr.mount_gradio_app(
        app,
        blocks,
        APP,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_asset("page.css"),
        head=f"<script>{_asset('page.js')}</script>",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
        show_error=False,
        max_file_size=1,
    )
    return EventFilter(mounted, blocks)


def _asset(name: str) -> str:
    return (files("diptych.serve.app") / name).read_text("utf8")


def unread(blocks: Any, request: Any) -> Callable[[], int]:
    """Returns a function that counts the unread messages of a request's page."""
    waiting = blocks._queue.pending_messages_per_session
    return lambda: waiting[request.session_hash].qsize() if request.session_hash in waiting else 0


def owner_of(request: Any) -> str:
    """Returns the owner of a request of the app, set by the guard as for the API."""
    return request.request.state.owner


PREFIX = f"{APP}/gradio_api/"
MAX_EVENT = 2**20  # bytes
UNREAD = 32  # unread messages of a page, beyond which its events are rejected
UNCHECKED = "event_data"  # Gradio's field for what was clicked; never used as a file


class EventFilter:
    """An ASGI middleware that checks the app's events and separates the sessions of owners. `blocks` is the page."""

    def __init__(self, app: Any, blocks: Any) -> None:
        self.app, self.known, self.queue = app, blocks.fns, blocks._queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self.app(scope, receive, send)
            return
        owner = scope["state"]["owner"]
        if scope["method"] != "POST":
            if (refusal := self._as_session(scope, owner)) is not None:
                await refusal(scope, receive, send)
                return
            await self.app(scope, receive, send)
            return
        try:
            body, refusal = self._as_event(await Request(scope, receive).body(), scope, owner)
        except HTTPException as error:  # too large or too slow
            body, refusal = b"", error_responses.answer(error.status_code, str(error.detail))
            refusal.headers["Connection"] = "close"
        except ClientDisconnect:
            return
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        sent = False

        async def again() -> MutableMapping[str, Any]:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    def _as_event(self, body: bytes, scope: Scope, owner: str) -> tuple[bytes, Any]:
        """The body for Gradio, and a rejection if it is not a valid event."""
        if not body:
            return body, None
        try:
            event = read(body)
            check(event, self.known)
        except UsageError as error:
            return b"", error_responses.of_error(error)
        if isinstance(event.get("session_hash"), str):
            event["session_hash"] = _of(owner, event["session_hash"])
            if scope["path"].removeprefix(PREFIX).startswith("queue/join"):
                waiting = self.queue.pending_messages_per_session.get(event["session_hash"])
                if waiting is not None and waiting.qsize() > UNREAD:
                    stale = "This page does not read its messages. Reload it."
                    return b"", error_responses.answer(429, stale, headers={"Retry-After": "5"})
                self._drop_old()
        return json.dumps(event).encode(), None

    def _drop_old(self) -> None:
        """Drops the events of sessions whose messages Gradio has dropped."""
        events, messages = self.queue.pending_event_ids_session, self.queue.pending_messages_per_session
        if len(events) > 2 * messages.max_size:
            for session in [session for session in events if session not in messages]:
                del events[session]

    def _as_session(self, scope: Scope, owner: str) -> Any:
        """Prefixes the session in the address with the owner's name; returns a rejection for an unknown session."""
        name = scope["path"].removeprefix(PREFIX)
        if name.startswith("heartbeat/"):
            scope["path"] = PREFIX + "heartbeat/" + _of(owner, name.removeprefix("heartbeat/"))
            scope["raw_path"] = quote(scope["path"]).encode()
        elif name.startswith("queue/data"):
            query = [
                (key, _of(owner, value) if key == "session_hash" else value)
                for key, value in parse_qsl(scope["query_string"].decode("latin1"))
            ]
            scope["query_string"] = urlencode(query).encode()
            if dict(query).get("session_hash") not in self.queue.pending_messages_per_session:
                return error_responses.answer(404, "Unknown session. Reload the page.", "request_invalid")
        return None


def _of(owner: str, session: str) -> str:
    return session if owner == LOCAL else f"{owner}:{session}"


def read(body: bytes) -> dict[str, Any]:
    """Parses an event of the app. UsageError if it is too large or not a JSON object."""
    if len(body) > MAX_EVENT:
        raise UsageError("request_invalid", f"An event of the app has at most {MAX_EVENT // 2**10} KiB.")
    try:
        event = parse_request(body)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError("json_invalid", f"An event of the app must be JSON ({error}).") from None
    if not isinstance(event, dict):
        raise UsageError("json_invalid", "An event of the app must be a JSON object.")
    return event


def check(event: dict[str, Any], known: Container[int]) -> None:
    """Raises UsageError for an event that the page does not have, or with values other than texts and numbers."""
    number = event.get("fn_index")
    if number is not None and (type(number) is not int or number not in known):
        raise UsageError("request_invalid", "The page has no such event. Reload it.")
    left = [value for name, value in event.items() if name != UNCHECKED]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            raise UsageError("request_invalid", "The app's fields take texts and numbers, not objects.")
        if isinstance(value, list):
            left += value
        elif isinstance(value, str) and re.search(r"[\ud800-\udfff]", value):  # Gradio could not send them back
            raise UsageError("text_invalid", "A text contains characters that are not text.")
