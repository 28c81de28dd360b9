"""The endpoint's tests talk to a real server on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parent))  # `chat_server` is also what other processes import

from chat_server import Act, Call, ChatServer

from diptych.llm.endpoint import Endpoint


class Verdict(BaseModel):
    """An answer as a judge gives it."""

    same: bool
    score: float


@pytest.fixture
def verdict() -> type[BaseModel]:
    return Verdict


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Call], Act]], ChatServer]]:
    """Starts a server that does with each call what a function says."""
    servers: list[ChatServer] = []

    def start(act: Callable[[Call], Act]) -> ChatServer:
        servers.append(ChatServer(act))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def endpoint() -> Callable[..., Endpoint]:
    """Settings for a server of the tests: nothing waits for long."""

    def make(server: ChatServer, **values: Any) -> Endpoint:
        quick: dict[str, Any] = {"timeout": 20.0, "backoff": 0.01, "retries": 3, "concurrency": 4}
        return Endpoint(base_url=server.url, model="tiny", **(quick | values))

    return make
