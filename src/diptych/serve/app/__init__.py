"""The web app: one Gradio page with a tab for each job, on the server's own address, behind the server's own guard.

A tab is a function that adds components inside `gr.Blocks` and knows the `Service`; `tabs` lists them, so that another
is one line. Pictures never pass through Gradio: the page sends them to /v1/references and shows them from
/v1/pictures, where everybody sees their own, so that Gradio's cache of files stays empty.
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

SESSIONS = 256  # open pages whose state is kept, the latest: over 100 KB each, and Gradio lets none go by itself
Tab = Callable[[Any, Service], None]  # (the gr.Blocks it is in, the service)


def tabs(service: Service) -> dict[str, Tab]:
    """The tabs by name, in order."""
    from diptych.serve.app import image_tabs, run_tabs

    found: dict[str, Tab] = {
        "Create": image_tabs.add_create,
        "Relight": image_tabs.add_relight,
        "Story": image_tabs.add_story,
    }
    if service.runs is not None:
        found |= {"Data": run_tabs.add_data, "Runs": run_tabs.add_runs}
    return found


def mount(app: Any, service: Service) -> Any:
    """The FastAPI app with the web app under /app."""
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
    """Counts the messages that wait for the page that a request came from."""
    waiting = blocks._queue.pending_messages_per_session
    return lambda: waiting[request.session_hash].qsize() if request.session_hash in waiting else 0


def owner_of(request: Any) -> str:
    """Whose a request of the app is: what the guard found, as for the API."""
    return request.request.state.owner


PREFIX = f"{APP}/gradio_api/"


MOST = 2**20  # bytes of an event


UNREAD = 32  # messages that may wait for a page that does not read them


MAY = "event_data"  # where Gradio says what was clicked on; never taken for a file


class EventFilter:
    """An ASGI middleware around the app; see the module. `blocks` is Gradio's page: its events and sessions."""

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
            body, refusal = (
                b"",
                error_responses.answer(error.status_code, str(error.detail), headers={"Connection": "close"}),
            )
        except ClientDisconnect:
            return
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        told = False

        async def again() -> MutableMapping[str, Any]:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    def _as_event(self, body: bytes, scope: Scope, owner: str) -> tuple[bytes, Any]:
        """The body as Gradio gets it, and a refusal if there is something wrong with it."""
        if not body:
            return body, None
        try:
            event = read(body)
            check(event, self.known)
        except ValueError as error:
            return b"", error_responses.answer(400, str(error))
        if isinstance(event.get("session_hash"), str):
            event["session_hash"] = _of(owner, event["session_hash"])
            if scope["path"].removeprefix(PREFIX).startswith("queue/join"):
                waiting = self.queue.pending_messages_per_session.get(event["session_hash"])
                if waiting is not None and waiting.qsize() > UNREAD:
                    said = "this page does not read what it is sent; load it again"
                    return b"", error_responses.answer(429, said, headers={"Retry-After": "5"})
                self._let_go()
        return json.dumps(event).encode(), None

    def _let_go(self) -> None:
        """Forgets the events of sessions whose messages Gradio has let go."""
        events, messages = self.queue.pending_event_ids_session, self.queue.pending_messages_per_session
        if len(events) > 2 * messages.max_size:
            for session in [session for session in events if session not in messages]:
                del events[session]

    def _as_session(self, scope: Scope, owner: str) -> Any:
        """Puts the owner's name before the session in the address; a refusal if there is no such stream."""
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
                return error_responses.answer(404, "there is no such session")
        return None


def _of(owner: str, session: str) -> str:
    return session if owner == LOCAL else f"{owner}:{session}"


def read(body: bytes) -> dict[str, Any]:
    """An event. ValueError says what is wrong with it."""
    if len(body) > MOST:
        raise ValueError(f"an event of the app is at most {MOST // 2**10} KiB")
    try:
        event = parse_request(body)
    except UsageError:
        raise
    except ValueError as error:
        raise ValueError(f"an event of the app is JSON ({error})") from None
    if not isinstance(event, dict):
        raise ValueError("an event of the app is an object")
    return event


def check(event: dict[str, Any], known: Container[int]) -> None:
    """ValueError for an event that is none of the page's, or that holds more than texts and numbers."""
    number = event.get("fn_index")
    if number is not None and (type(number) is not int or number not in known):
        raise ValueError("the page has no such event; load it again")
    left = [value for name, value in event.items() if name != MAY]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            raise ValueError("the app's fields hold texts and numbers, no objects")
        if isinstance(value, list):
            left += value
        elif isinstance(value, str) and re.search(r"[\ud800-\udfff]", value):
            raise ValueError("there are characters in it that are no text")  # Gradio could not send them back
