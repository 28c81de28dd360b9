"""What the app's page may send to Gradio: texts, numbers and lists of them.

Gradio takes an object with a path in it for a file, wherever it stands in an event, and a mounted app has no list of
paths that may be read: it would copy any file of the machine, or the answer of any address, into its cache. No field of
ours holds an object, so none is let through.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Container, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from diptych.documents import parse_json
from diptych.serve import errors
from diptych.serve.guard import APP

MOST = 2**20  # bytes of an event
MAY = "event_data"  # where Gradio says what was clicked on; never taken for a file


class Plain:
    """An ASGI middleware around the app; see the module. `known` are the numbers of the page's events."""

    def __init__(self, app: Any, known: Container[int]) -> None:
        self.app, self.known = app, known

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith(f"{APP}/gradio_api/"):
            await self.app(scope, receive, send)
            return
        try:
            body = await Request(scope, receive).body()
            refusal = errors.answer(400, said) if (said := fault(body, self.known)) else None
        except HTTPException as error:  # too large or too slow
            body, refusal = b"", errors.answer(error.status_code, str(error.detail), headers={"Connection": "close"})
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


def fault(body: bytes, known: Container[int]) -> str:
    """What is wrong with an event, empty if nothing is."""
    if not body:
        return ""
    if len(body) > MOST:
        return f"an event of the app is at most {MOST // 2**10} KiB"
    try:
        event = parse_json(body)
    except (ValueError, RecursionError):
        return "an event of the app is JSON"
    if not isinstance(event, dict):
        return "an event of the app is an object"
    number = event.get("fn_index")
    if number is not None and (type(number) is not int or number not in known):
        return "the page has no such event; load it again"
    left = [value for name, value in event.items() if name != MAY]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            return "the app's fields hold texts and numbers, no objects"
        if isinstance(value, list):
            left += value
        elif isinstance(value, str) and re.search(r"[\ud800-\udfff]", value):
            return "there are characters in it that are no text"  # Gradio could not send them back
    return ""
