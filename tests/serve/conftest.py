"""The pocket student, loaded once; a server for this machine, and one that asks for tokens."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from diptych import Student
from diptych.serve.config import ServerSettings
from serve.running import CAT, TOKENS, Running


@pytest.fixture(scope="session")
def student() -> Student:
    return Student.load("pocket", progress_bar=False)


@pytest.fixture(scope="module")
def server(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(ServerSettings(folder=tmp_path_factory.mktemp("local")), student)
    yield running
    running.close()


@pytest.fixture(scope="module")
def guarded(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(ServerSettings(folder=tmp_path_factory.mktemp("guarded"), tokens=TOKENS), student)
    yield running
    running.close()


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture
def cat() -> bytes:
    return CAT.read_bytes()
