"""Replies in other protocols than chat completions, recognized by their form, and what to do about each."""

from __future__ import annotations

import json
import re
from typing import Any

_STREAM = re.compile(rb"\s*(?:\xef\xbb\xbf)?(?:data|event|id|retry)?:")
_UNSTREAMED = "it streams, although it was asked not to; turn streaming off in the server or in the proxy before it"
_OPENAI = "set base_url to its OpenAI-compatible API, which mostly ends in /v1"


def foreign(data: bytes) -> str:
    """What a reply is instead of a chat completion, and the remedy; "" for anything that is not recognized."""
    if _STREAM.match(data):
        return f"a stream of server-sent events: {_UNSTREAMED}"
    try:
        # Ollama's stream is one object a line.
        value: Any = json.loads(data if b"\n{" not in data.strip() else data.strip().splitlines()[0])
    except (ValueError, RecursionError):
        return ""
    if not isinstance(value, dict):
        return ""
    if "done" in value and ("message" in value or "response" in value):
        return f"a reply of Ollama's native API: {_OPENAI}, for Ollama http://localhost:11434/v1"
    if value.get("object") == "chat.completion.chunk":
        return f"a piece of a stream: {_UNSTREAMED}"
    if value.get("object") == "response" and "output" in value:
        return f"a reply of the Responses API: {_OPENAI}, without /responses"
    if value.get("type") == "message" and isinstance(value.get("content"), list):
        return f"a reply of Anthropic's Messages API: {_OPENAI}"
    if isinstance(value.get("candidates"), list):
        return f"a reply of Gemini's native API: {_OPENAI}, for Gemini /v1beta/openai"
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(first, dict) and "text" in first and "message" not in first:
        return f"a plain text completion: {_OPENAI}"
    return ""
