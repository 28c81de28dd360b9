"""What the app's page may send to Gradio: texts, numbers and lists of them.

Gradio takes an object with a path in it for a file, wherever it stands in an event, and a mounted app has no list of
paths that may be read: it would copy any file of the machine, or the answer of any address, into its cache. No field of
ours holds an object, so none is let through.

A page names its session itself, and Gradio gives a session's events to whoever has the name. Here the owner's name is
put before it, so that nobody reads or stops the events of somebody else's page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from diptych.errors import UsageError
from diptych.serve.auth import LOCAL
from diptych.serve.http import error_responses
from diptych.serve.http.guard import APP, Receive, Scope, Send
from diptych.utils.documents import parse_request

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
