"""A real HTTP server that speaks the chat-completions protocol, and misbehaves as it is told."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Call:
    """A request. `number` counts them from 0, `time` is when it came."""

    body: dict[str, Any]
    headers: dict[str, str]
    number: int
    time: float

    @property
    def turns(self) -> int:
        return len(self.body["messages"])

    def text(self, message: int = 0) -> str:
        content = self.body["messages"][message]["content"]
        return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


@dataclass(frozen=True)
class Act:
    """What to do with it: wait, then send a body, less than promised, or hang up."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    missing: int = 0
    hang_up: bool = False
    drip: str = ""
    """Sends its "head" or its "body" a byte at a time, each after a tenth of a second."""


def say(content: Any, delay: float = 0.0, finish: str = "stop", **message: Any) -> Act:
    """A proper reply; a `content` that is no text is sent as its JSON."""
    text = content if isinstance(content, str | None) else json.dumps(content)
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text} | message}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    whole = {"id": "x", "object": "chat.completion", "model": "tiny-1", "choices": [choice], "usage": usage}
    return Act(json.dumps(whole).encode(), delay=delay)


def refuse(status: int, message: str, headers: dict[str, str] | None = None, **error: Any) -> Act:
    """An error as such servers send it."""
    return Act(json.dumps({"error": {"message": message} | error}).encode(), status, headers or {})


class ChatServer:
    """Serves on a free port until closed. `calls` are all that came, `most_at_once` how many at a time."""

    def __init__(self, act: Callable[[Call], Act]) -> None:
        self.calls: list[Call] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                call = outer._came(body, dict(self.headers))
                todo = act(call) if self.path == "/v1/chat/completions" else Act(status=404)
                outer._closing.wait(todo.delay)
                with outer._lock:
                    outer._at_once -= 1
                try:
                    outer._send(self, todo)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client did not wait

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # connections that the client lost

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _came(self, body: dict[str, Any], headers: dict[str, str]) -> Call:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.calls.append(Call(body, headers, len(self.calls), time.monotonic()))
            return self.calls[-1]

    def _send(self, handler: BaseHTTPRequestHandler, act: Act) -> None:
        if act.hang_up:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        if act.drip == "head":
            handler.close_connection = True
            self._drip(handler, b"HTTP/1.1 200 OK\r\nX-Slow: " + 200 * b"x")
            return
        handler.send_response(act.status)
        for name, value in act.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(act.body) + act.missing))
        handler.end_headers()
        if act.drip == "body":
            self._drip(handler, act.body)
            return
        handler.wfile.write(act.body)
        handler.close_connection = handler.close_connection or act.missing > 0

    def _drip(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        for byte in data:
            if self._closing.wait(0.1):
                return
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()

    def close(self) -> None:
        """Ends it, whatever is still waiting."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()


Serve = Callable[[Callable[[Call], Act]], ChatServer]
"""What the fixture `serve` gives."""
