"""The endpoint's tests talk to a real server on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

from diptych.llm.endpoint import Endpoint
from llm.chat_server import ChatServer


class Verdict(BaseModel):
    """An answer as a judge gives it."""

    same: bool
    score: float


@pytest.fixture
def verdict() -> type[BaseModel]:
    return Verdict


@pytest.fixture
def endpoint() -> Callable[..., Endpoint]:
    """Settings for a server of the tests: nothing waits for long."""

    def make(server: ChatServer, **values: Any) -> Endpoint:
        quick: dict[str, Any] = {"timeout": 20.0, "backoff": 0.01, "retries": 3, "concurrency": 4}
        return Endpoint(base_url=server.url, model="tiny", **(quick | values))

    return make
