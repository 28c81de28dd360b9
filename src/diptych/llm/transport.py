"""One request of the chat-completions protocol, tried until it succeeds or cannot.

What passes is tried again: 429, 5xx, time-outs, lost connections, replies that are none. What this question alone is
guilty of (400, 413, 422 …) is given up. What every question would meet (a wrong key, an unknown model, no credit, a
server that stays silent) stops the run with one line. The key is read from the environment for each request and is
struck out of every word that comes back.
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
from diptych.llm.pace import Network, Pace, pause, retry_after
from diptych.llm.question import GaveUp, Message, Picture, Question, Reply, Usage, clean
from diptych.llm.replies import foreign

MAX_REPLY = 16 * 2**20  # bytes
LONGEST_WAIT = 600.0  # seconds; a server that asks for more has a quota that is used up
PICTURE_TOKENS = 1000  # a guess, until the first reply says
_SHORTEST_SECRET = 8  # characters; "EMPTY" and its like are no secrets, and may be words of an answer
_MOST_TOKENS = 10**9  # of one reply; a server that counts more does not count
_TRANSIENT = frozenset({408, 425, 429})
_REASONING = ("reasoning_content", "reasoning")
_FORM = re.compile(r"response_format|json_schema|guided|grammar|structured", re.IGNORECASE)


class _Again(Exception):
    """This try failed in a way that passes."""


class Transport:
    """The connection to an endpoint, shared by threads. UserError if no HTTP library is installed."""

    def __init__(self, endpoint: Endpoint, pace: Pace | None = None) -> None:
        self.endpoint = endpoint
        self.sent = 0
        self._httpx = _library()
        self._pace = pace or Pace(endpoint.requests_per_minute, endpoint.tokens_per_minute)
        self._lock = threading.Lock()
        self._answered = False
        limits = self._httpx.Limits(max_connections=None, max_keepalive_connections=endpoint.concurrency)
        self._http = self._httpx.Client(timeout=endpoint.timeout, limits=limits, follow_redirects=False)
        self._network = Network(self._http)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def complete(self, messages: tuple[Message, ...], question: Question, stop: threading.Event) -> Reply:
        """The model's next turn. GaveUp for this question alone, or once `stop` is set; UserError for the whole run."""
        body = {"model": self.endpoint.model, "messages": questions.body(messages), **self.endpoint.sampling()}
        body["stream"] = False  # some servers stream unless a request says no
        body |= schema.response_format(question.answer, self.endpoint.json_mode)
        reply = self._persist(json.dumps(body).encode(), _guess(messages, self.endpoint), stop)
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
        # `from None`: an HTTP library's exception holds the request, headers and all.
        try:
            status, after, place, data = self._post(body, headers)
        except self._httpx.TimeoutException:
            raise _Again(f"no whole reply within {self.endpoint.timeout:g} s") from None
        except (self._httpx.RequestError, self._httpx.InvalidURL) as error:
            raise _Again(f"no connection ({_line(_hide(str(error), key)) or type(error).__name__})") from None
        # Struck out before anything is cut short, and once more from what was escaped until it was parsed.
        data = data.replace(key.encode(), b"***") if len(key) >= _SHORTEST_SECRET else data
        if 300 <= status < 400:
            raise UserError(f"{self.endpoint.base_url} has moved to {_line(_hide(place, key))}; set base_url to it")
        if status != 200:
            self._refused(status, after, _hide(_message(data), key), _code(data))
        if not self._answered and (kind := foreign(data)):
            raise UserError(f"{self.endpoint.base_url} answers, but not with a chat completion: {kind}")
        return _reply(data, key)

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, str | None, str, bytes]:
        """(status, Retry-After, Location, body), from connecting to the last byte within the endpoint's time-out."""
        data = bytearray()
        url = f"{self.endpoint.base_url}/chat/completions"
        within = self._network.within(self.endpoint.timeout)
        with within, self._http.stream("POST", url, content=body, headers=headers) as response:
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > MAX_REPLY:
                    raise _Again(f"a reply of more than {MAX_REPLY // 2**20} MiB")
            place = response.headers.get("location", "elsewhere")
            return response.status_code, response.headers.get("retry-after"), place, bytes(data)

    def _refused(self, status: int, after: str | None, message: str, code: str) -> NoReturn:
        """Raises what a status that is not 200 means."""
        where, said = self.endpoint.base_url, f"{status}: {message}" if message else str(status)
        name = self.endpoint.api_key_env
        if status == 402 or (status == 429 and code == "insufficient_quota"):
            raise UserError(f"{where} gives no more credit ({said})")
        if status == 401 or (status == 403 and not self._answered):
            how = f"check the environment variable {name}" if name else "set api_key_env, and the variable it names"
            raise UserError(f"{where} refuses the key ({said}); {how}")
        if status == 404:
            raise UserError(
                f"{where} has no model '{self.endpoint.model}', or no /chat/completions ({said}); check model and "
                "base_url, which mostly ends in /v1"
            )
        if status in (400, 422) and not self._answered and self.endpoint.json_mode != "none" and _FORM.search(message):
            raise UserError(
                f"{where} cannot answer in the form asked for ({said}); set json_mode to "
                f"{'json_object or none' if self.endpoint.json_mode == 'json_schema' else 'none'}"
            )
        if status in _TRANSIENT or status >= 500:
            seconds = retry_after(after)
            if seconds is not None and seconds > LONGEST_WAIT:
                raise UserError(f"{where} asks to come back in {seconds / 3600:.1f} hours ({said}); run again then")
            if seconds:
                self._pace.hold(seconds)
            raise _Again(f"the server says {said}")
        raise GaveUp(f"the server refuses this question ({said})")

    def key(self) -> str:
        """The key that the settings name, empty if none. UserError if there is no such variable, or no key in it."""
        name = self.endpoint.api_key_env
        if name is None:
            return ""
        key = os.environ.get(name, "").strip()
        if not key:
            raise UserError(f"{self.endpoint.base_url} needs a key, and the environment variable {name} is not set")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"the environment variable {name} holds no key: there are spaces or other letters in it")
        return key


def _library() -> ModuleType:
    """httpx by whichever name: huggingface_hub brings httpx2, older ones httpx; they are the same to us."""
    try:
        import httpx2

        return httpx2
    except ImportError:
        pass
    try:
        import httpx  # pyright: ignore[reportMissingImports]

        return httpx
    except ImportError:
        raise UserError("endpoints need an HTTP library; install it: pip install 'diptych[llm]'") from None


def _guess(messages: tuple[Message, ...], endpoint: Endpoint) -> float:
    parts = [part for message in messages for part in message.parts]
    text = sum(len(part) for part in parts if isinstance(part, str)) / 4
    return text + PICTURE_TOKENS * sum(isinstance(part, Picture) for part in parts) + (endpoint.max_tokens or 1000)


def _reply(data: bytes, key: str) -> Reply:
    """A chat completion. _Again for anything else: a proxy's page, half a reply, an error in the place of one."""
    try:
        value: Any = json.loads(data)
        if isinstance(value, dict) and value.get("error"):
            raise _Again(_hide(f"the server says: {_message(data)}", key))
        choice = value["choices"][0]
        message, usage = choice["message"], value.get("usage") or {}
        content = _text(message.get("content"))
        reasoned = not content.strip() and bool(thoughts := _reasoning(message))
        content = thoughts if reasoned else content
        finish = choice.get("finish_reason")
        refused = message.get("refusal") or ("its filter says no" if finish == "content_filter" else "")
        tokens = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        counted = Usage(1, *(min(max(0, count), _MOST_TOKENS) for count in tokens))
        if not isinstance(refused, str):
            raise TypeError
        model = clean(str(value.get("model") or ""))[:200]
        text, refused = _hide(clean(content), key), _line(_hide(refused, key))
        return Reply(text, _hide(model, key), counted, refused, cut=finish == "length", reasoned=reasoned)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        start = _line(data[:80].decode("utf8", "replace"))
        raise _Again(_hide(f"the reply is no chat completion ('{start}')", key)) from None


def _text(content: Any) -> str:
    """A message's content, which may come in parts; TypeError if it is not text."""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    if not isinstance(content or "", str):
        raise TypeError
    return content or ""


def _reasoning(message: dict[str, Any]) -> str:
    """What a reasoning model thought aloud: vLLM, SGLang and DeepSeek call it `reasoning_content`, newer vLLM, Ollama
    and OpenRouter `reasoning`."""
    return next((said for name in _REASONING if isinstance(said := message.get(name), str) and said.strip()), "")


def _message(data: bytes) -> str:
    """The server's own words about an error, in one short line."""
    try:
        value: Any = json.loads(data)
        if isinstance(value, list) and value:
            value = value[0]
        for name in ("error", "message", "detail"):
            if isinstance(value, dict) and value.get(name):
                value = value[name]
        return _line(value if isinstance(value, str) else json.dumps(value))
    except (ValueError, RecursionError):
        return _line(data[:400].decode("utf8", "replace"))


def _code(data: bytes) -> str:
    try:
        error = json.loads(data)["error"]
        return str(error.get("code") or error.get("type") or "")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def _line(text: str) -> str:
    """One line that is safe to print, 200 characters at most."""
    return "".join(char for char in " ".join(text.split()) if char.isprintable())[:200]


def _hide(text: str, key: str) -> str:
    return text.replace(key, "***") if len(key) >= _SHORTEST_SECRET else text
