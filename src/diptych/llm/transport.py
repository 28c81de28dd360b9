"""One request of the chat-completions protocol, repeated until it succeeds or cannot succeed.

Errors that may pass are retried: 429, 5xx, time-outs, lost connections, and replies that are not chat completions.
Errors of one question (400, 413, 422 …) end that question. Errors that every question would meet (a wrong key, an
unknown model, no credit, a silent server) stop the run with one message. The key is read from the environment for each
request and is removed from everything that comes back.
"""

from __future__ import annotations

import json
import os
import re
import threading
from types import ModuleType
from typing import Any, NoReturn

from diptych.errors import UserError
from diptych.llm import question as questions
from diptych.llm import schema
from diptych.llm.endpoint import Endpoint
from diptych.llm.pace import Network, Pacing, pace_of, pause, retry_after
from diptych.llm.question import EncodedImage, GaveUp, Message, Question, Reply, Usage, clean

MAX_REPLY = 16 * 2**20  # bytes
MAX_WAIT = 600.0  # seconds; a server that requests a longer wait has an exhausted quota
IMAGE_TOKENS = 1000  # an estimate until the first reply gives the real number
_MIN_SECRET = 8  # characters; "EMPTY" and the like are not secrets and may be words of an answer
_MAX_TOKENS = 10**9  # of one reply; larger counts of a server are errors
_TRANSIENT = frozenset({408, 425, 429})
_REASONING = ("reasoning_content", "reasoning")
_FORM = re.compile(r"response_format|json_schema|guided|grammar|structured", re.IGNORECASE)
_STREAM = re.compile(rb"\s*(?:\xef\xbb\xbf)?(?:data|event|id|retry)?:")
_UNSTREAMED = "Turn streaming off in the server or in the proxy before it."
_OPENAI = "Set base_url to the server's OpenAI-compatible API, which mostly ends in /v1"


class _Again(Exception):
    """This try failed in a way that may pass."""


class Transport:
    """The connection to an endpoint, shared by threads. Raises UserError if no HTTP library is installed."""

    def __init__(self, endpoint: Endpoint, pace: Pacing | None = None) -> None:
        self.endpoint = endpoint
        self.sent = 0
        self._httpx = _library()
        self._pace = pace or pace_of(endpoint)
        self._lock = threading.Lock()
        self._answered = False
        limits = self._httpx.Limits(max_connections=None, max_keepalive_connections=endpoint.concurrency)
        self._http = self._httpx.Client(timeout=endpoint.timeout, limits=limits, follow_redirects=False)
        self._network = Network(self._http)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def complete(self, messages: tuple[Message, ...], question: Question, stop: threading.Event) -> Reply:
        """Return the model's next turn.

        Raises GaveUp for this question alone, or once `stop` is set, and UserError for the whole run.
        """
        body = {"model": self.endpoint.model, "messages": questions.body(messages), **self.endpoint.sampling()}
        body["stream"] = False  # some servers stream by default
        body |= schema.response_format(question.answer, self.endpoint.json_mode)
        reply = self._persist(json.dumps(body).encode(), _estimate(messages, self.endpoint), stop)
        self._answered = True
        return reply

    def _persist(self, body: bytes, guess: float, stop: threading.Event) -> Reply:
        tries = self.endpoint.retries + 1
        attempt, reason = 0, ""
        for attempt in range(tries):
            booked = self._wait_for_turn(guess, stop)
            spent = 0
            try:
                reply = self._once(body)
                spent = reply.usage.input_tokens + reply.usage.output_tokens
                return reply
            except _Again as error:
                reason = str(error)
            finally:
                self._pace.correct(booked, spent)
            if attempt + 1 < tries and stop.wait(pause(attempt, self.endpoint.backoff)):
                break
        raise GaveUp(f"{reason} ({attempt + 1} {'tries' if attempt else 'try'})", passing=True)

    def _wait_for_turn(self, guess: float, stop: threading.Event) -> float:
        seconds, booked = self._pace.book(guess)
        while seconds > 0 and not stop.wait(seconds):
            seconds = self._pace.held()
        if stop.is_set():
            self._pace.correct(booked, 0)
            raise GaveUp("the run was stopped", passing=True)
        return booked

    def _once(self, body: bytes) -> Reply:
        key = self.key()
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "diptych"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        with self._lock:
            self.sent += 1
        # `from None`: an HTTP library's exception has the request with its headers.
        try:
            status, after, location, data = self._post(body, headers)
        except self._httpx.TimeoutException:
            raise _Again(f"no whole reply within {self.endpoint.timeout:g} s") from None
        except (self._httpx.RequestError, self._httpx.InvalidURL) as error:
            raise _Again(f"no connection ({_line(_hide(str(error), key)) or type(error).__name__})") from None
        # The key is removed before anything is shortened, and again after parsing, which undoes escapes.
        data = data.replace(key.encode(), b"***") if len(key) >= _MIN_SECRET else data
        where = self.endpoint.base_url
        if 300 <= status < 400:
            moved = f"{where} has moved to {_line(_hide(location, key))}. Set base_url to the new address."
            raise UserError("endpoint_unreachable", moved)
        if status != 200:
            message, code = _error(data)
            self._raise_status(status, after, _hide(message, key), code)
        if not self._answered and (kind := other_protocol(data)):
            raise UserError("endpoint_unsuited", f"{where} does not reply with a chat completion but with {kind}")
        return _reply(data, key)

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, str | None, str, bytes]:
        """Return (status, Retry-After, Location, body). Everything happens within the endpoint's time-out."""
        data = bytearray()
        url = f"{self.endpoint.base_url}/chat/completions"
        within = self._network.within(self.endpoint.timeout)
        with within, self._http.stream("POST", url, content=body, headers=headers) as response:
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > MAX_REPLY:
                    raise _Again(f"a reply of more than {MAX_REPLY // 2**20} MiB")
            location = response.headers.get("location", "an unknown address")
            return response.status_code, response.headers.get("retry-after"), location, bytes(data)

    def _raise_status(self, status: int, after: str | None, message: str, code: str) -> NoReturn:
        """Raise the error that a status other than 200 means."""
        where, reply = self.endpoint.base_url, f"{status}: {message}" if message else str(status)
        name = self.endpoint.api_key_env
        if status == 402 or (status == 429 and code == "insufficient_quota"):
            raise UserError("endpoint_quota", f"Quota exhausted at {where} ({reply}). Add credit, then run again.")
        if status == 401 or (status == 403 and not self._answered):
            how = f"Check the environment variable {name}." if name else "Set api_key_env and the variable it names."
            raise UserError("endpoint_refused", f"{where} rejects the API key ({reply}). {how}")
        if status == 404:
            raise UserError(
                "endpoint_model_unknown",
                f"{where} has no model '{self.endpoint.model}' or no /chat/completions ({reply}). Check model, and "
                "base_url, which mostly ends in /v1.",
            )
        if status in (400, 422) and not self._answered and self.endpoint.json_mode != "none" and _FORM.search(message):
            other = "json_object or none" if self.endpoint.json_mode == "json_schema" else "none"
            raise UserError(
                "endpoint_unsuited",
                f"{where} does not support json_mode {self.endpoint.json_mode} ({reply}). Set json_mode to {other}.",
            )
        if status in _TRANSIENT or status >= 500:
            seconds = retry_after(after)
            if seconds is not None and seconds > MAX_WAIT:
                hours = f"{seconds / 3600:.1f} hours"
                raise UserError("endpoint_quota", f"Rate limit exceeded at {where} ({reply}). Run again in {hours}.")
            if seconds:
                self._pace.hold(seconds)
            raise _Again(f"the server says {reply}")
        raise GaveUp(f"the server refuses this question ({reply})")

    def key(self) -> str:
        """Return the key that the settings name, or "". Raises UserError if the variable is not set or not a key."""
        name = self.endpoint.api_key_env
        if name is None:
            return ""
        key = os.environ.get(name, "").strip()
        if not key:
            unset = f"The environment variable {name}, which has the API key for {self.endpoint.base_url}, is not set."
            raise UserError("endpoint_refused", unset)
        if not key.isascii() or not key.isprintable() or " " in key:
            wrong = f"The environment variable {name} has spaces or characters that API keys do not have. Correct it."
            raise UserError("endpoint_refused", wrong)
        return key


def _library() -> ModuleType:
    """Return httpx2, which huggingface_hub installs, or httpx, which older versions install. Both work alike here."""
    try:
        import httpx2

        return httpx2
    except ImportError:
        pass
    try:
        import httpx  # pyright: ignore[reportMissingImports]

        return httpx
    except ImportError:
        missing = "Endpoints need an HTTP library. Install it: pip install 'diptych[llm]'"
        raise UserError("dependency_missing", missing) from None


def _estimate(messages: tuple[Message, ...], endpoint: Endpoint) -> float:
    parts = [part for message in messages for part in message.parts]
    text = sum(len(part) for part in parts if isinstance(part, str)) / 4
    images = sum(isinstance(part, EncodedImage) for part in parts)
    return text + IMAGE_TOKENS * images + (endpoint.max_tokens or 1000)


def other_protocol(data: bytes) -> str:
    """Name the protocol of a reply that is not a chat completion, with a remedy; "" if it is not recognized."""
    if _STREAM.match(data):
        return f"a stream of server-sent events. {_UNSTREAMED}"
    try:
        # Ollama's stream is one object a line.
        value: Any = json.loads(data if b"\n{" not in data.strip() else data.strip().splitlines()[0])
    except (ValueError, RecursionError):
        return ""
    if not isinstance(value, dict):
        return ""
    if "done" in value and ("message" in value or "response" in value):
        return f"a reply of Ollama's native API. {_OPENAI}, for Ollama http://localhost:11434/v1."
    if value.get("object") == "chat.completion.chunk":
        return f"a piece of a stream. {_UNSTREAMED}"
    if value.get("object") == "response" and "output" in value:
        return f"a reply of the Responses API. {_OPENAI}, without /responses."
    if value.get("type") == "message" and isinstance(value.get("content"), list):
        return f"a reply of Anthropic's Messages API. {_OPENAI}."
    if isinstance(value.get("candidates"), list):
        return f"a reply of Gemini's native API. {_OPENAI}, for Gemini /v1beta/openai."
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(first, dict) and "text" in first and "message" not in first:
        return f"a plain text completion. {_OPENAI}."
    return ""


def _reply(data: bytes, key: str) -> Reply:
    """Parse a chat completion. Raises _Again for anything else, such as a proxy's page, half a reply or an error."""
    try:
        value: Any = json.loads(data)
        if isinstance(value, dict) and value.get("error"):
            raise _Again(_hide(f"the server says: {_error(data)[0]}", key))
        choice = value["choices"][0]
        message, usage = choice["message"], value.get("usage") or {}
        content = _text(message.get("content"))
        reasoned = not content.strip() and bool(thoughts := _reasoning(message))
        content = thoughts if reasoned else content
        finish = choice.get("finish_reason")
        refused = message.get("refusal") or ("its filter says no" if finish == "content_filter" else "")
        tokens = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        counted = Usage(1, *(min(max(0, count), _MAX_TOKENS) for count in tokens))
        if not isinstance(refused, str):
            raise TypeError
        model = clean(str(value.get("model") or ""))[:200]
        text, refused = _hide(clean(content), key), _line(_hide(refused, key))
        return Reply(text, _hide(model, key), counted, refused, cut=finish == "length", reasoned=reasoned)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        start = _line(data[:80].decode("utf8", "replace"))
        raise _Again(_hide(f"the reply is no chat completion ('{start}')", key)) from None


def _text(content: Any) -> str:
    """Return a message's content, which may have several parts. Raises TypeError if it is not text."""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    if not isinstance(content or "", str):
        raise TypeError
    return content or ""


def _reasoning(message: dict[str, Any]) -> str:
    """Return a model's reasoning: `reasoning_content` in vLLM, SGLang and DeepSeek, and `reasoning` in newer vLLM,
    Ollama and OpenRouter."""
    return next((text for name in _REASONING if isinstance(text := message.get(name), str) and text.strip()), "")


def _error(data: bytes) -> tuple[str, str]:
    """Return the message of a server's error, as one short line, and its code, or ""."""
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        return _line(data[:400].decode("utf8", "replace")), ""
    code = ""
    if isinstance(value, list) and value:
        value = value[0]
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
            if isinstance(value, dict):
                code = str(value.get("code") or value.get("type") or "")
    return _line(value if isinstance(value, str) else json.dumps(value)), code


def _line(text: str) -> str:
    """Return one line that is safe to print, with 200 characters at most."""
    return "".join(char for char in " ".join(text.split()) if char.isprintable())[:200]


def _hide(text: str, key: str) -> str:
    return text.replace(key, "***") if len(key) >= _MIN_SECRET else text
