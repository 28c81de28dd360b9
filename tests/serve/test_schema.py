"""Requests generated from the server's OpenAPI description: no response is a server error, all match it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from diptych import Student
from diptych.serve.config import Limits, ServerSettings
from serve.running import TOKENS, Running

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
BEARER = {"Authorization": f"Bearer {TOKENS['ana']}"}


@pytest.fixture(scope="module")
def fuzzed(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose images take one step by default."""
    quick = Student(student.pipeline, "pocket", sampling={"steps": 1})
    folder, runs = tmp_path_factory.mktemp("fuzzed"), tmp_path_factory.mktemp("runs")
    limits = Limits(steps=2, pictures=2, queue=10_000, guesses=0)
    running = Running(ServerSettings(folder=folder, tokens=TOKENS, runs=runs, limits=limits), quick)
    yield running
    running.close()


@pytest.fixture(scope="module")
def described(fuzzed: Running) -> Any:
    return schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json", headers=BEARER)


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.large_base_example]


def fuzz(described: Any, fuzzed: Running, examples: int) -> None:
    """Made-up requests to every operation of the description."""
    for found in described.get_all_operations():

        @settings(max_examples=examples, deadline=None, suppress_health_check=QUIET)
        @given(case=found.ok().as_strategy())
        def ask(case: Any) -> None:
            check(case, fuzzed)

        ask()


def test_the_api_is_as_it_is_described(described: Any, fuzzed: Running) -> None:
    fuzz(described, fuzzed, 6)


@pytest.mark.soak
def test_thousands_of_made_up_requests_do_no_harm(described: Any, fuzzed: Running) -> None:
    fuzz(described, fuzzed, 400)
    files = {path.name for path in fuzzed.service.settings.folder.rglob("*")}
    assert files <= {"jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm"}


def check(case: Any, fuzzed: Running) -> None:
    if case.path.endswith("/events") or (isinstance(case.body, dict) and case.body.get("stream")):
        return  # a stream has no end that a schema knows; see test_jobs
    response = case.call(base_url=fuzzed.url, headers=BEARER, timeout=120)
    case.validate_response(response, checks=CHECKS)
    if not case.path.endswith("z"):  # health needs no token
        assert case.call(base_url=fuzzed.url, timeout=120).status_code in (400, 401, 413, 421, 429)
