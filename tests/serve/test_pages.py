"""What operators and developers see: the API's pages, the icon, the log of requests, limits in plain units."""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path

import httpx
import pytest

from diptych import Student
from diptych.cli import app
from diptych.serve.config import Limits, ServerSettings
from diptych.serve.http import openapi
from serve.running import TOKENS, Running


def row(page: str, route: str, name: str) -> str:
    """The description of a field on the API's page."""
    part = page.partition(f"{route}</code>")[2].partition("</details>")[0]
    found = re.search(rf"<tr><td><code>{name}</code></td>(.*?)</tr>", part, re.DOTALL)
    assert found is not None, f"{route} has no {name}"
    return html.unescape(re.sub(r"<[^>]+>", "", found[1].replace("<br>", " ")))


def test_the_api_is_described_with_types_ranges_and_examples(client: httpx.Client) -> None:
    page = client.get("/docs").text
    generation = "POST /v1/images/generations"
    prompt = row(page, generation, "prompt")
    assert "text of at most 4,000 characters" in prompt and "required" in prompt and "a cat on a beach" in prompt
    assert "a whole number from 1 to 100" in row(page, generation, "steps")
    assert 'png, webp or jpeg; default "png"' in row(page, generation, "output_format")
    assert "WIDTHxHEIGHT" in row(page, generation, "size") and "64x64" in row(page, generation, "size")
    assert "an image file; required" in row(page, "POST /v1/images/edits", "image")
    assert "image_url" in row(page, "POST /v1/images/edits", "images")
    assert "a list of 1 to 10 values, each text" in row(page, "POST /v1/relights", "light")
    assert "a whole number from 1 to 100; query; default 20" in row(page, "GET /v1/jobs", "limit")
    schema = client.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        for method in methods:
            for field in openapi.of_route(schema, path, method):
                assert field.allowed not in ("", "a value") and field.name, (path, method, field.name)
                assert "^" not in field.allowed, (path, field.name)  # no pattern that people would have to read


def test_the_icon_is_there_for_every_page_and_needs_no_token(guarded: Running) -> None:
    found = httpx.get(f"{guarded.url}/favicon.ico", timeout=60)
    assert found.status_code == 200 and found.headers["content-type"] == "image/svg+xml" and b"<svg" in found.content
    login = httpx.get(f"{guarded.url}/login", timeout=60)
    assert 'rel="icon"' in login.text and "img-src 'self'" in login.headers["content-security-policy"]


def test_each_request_is_a_line_of_the_log_without_tokens_signatures_or_line_breaks(
    guarded: Running, caplog: pytest.LogCaptureFixture
) -> None:
    bearer = {"Authorization": f"Bearer {TOKENS['ana']}"}
    with caplog.at_level(logging.INFO, logger="diptych.access"):
        httpx.get(f"{guarded.url}/v1/jobs?limit=3&signature=secret", headers=bearer, timeout=60)
        httpx.get(f"{guarded.url}/v1/jobs", timeout=60)
        httpx.get(f"{guarded.url}/v1/a%0Ab%1b[31m", headers=bearer, timeout=60)
        httpx.get(f"{guarded.url}/healthz", timeout=60)
    lines = [record.getMessage() for record in caplog.records if record.name == "diptych.access"]
    assert [re.sub(r"\d+ ms$", "", line) for line in lines] == [
        "127.0.0.1 ana GET /v1/jobs 200 ",
        "127.0.0.1 - GET /v1/jobs 401 ",
        "127.0.0.1 ana GET /v1/a%0Ab%1B%5B31m 404 ",
    ]
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="diptych.access"):
        httpx.get(f"{guarded.url}/healthz", timeout=60)
    assert "GET /healthz 200" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diptych.access"):
        httpx.get(f"{guarded.url}/v1/jobs", headers=bearer, timeout=60)
    assert "diptych.access" not in caplog.text


def test_an_unknown_log_level_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.call(["serve", "--log-level", "wraning"]) == 2
    assert "did you mean 'warning'" in capsys.readouterr().err


def test_a_small_limit_is_said_in_a_unit_that_shows_it(student: Student, tmp_path: Path) -> None:
    running = Running(ServerSettings(folder=tmp_path, limits=Limits(upload_bytes=10_240)), student)
    try:
        answer = httpx.post(f"{running.url}/v1/references", content=b"x" * 20_000, timeout=60)
        assert answer.status_code == 413 and "10 KiB" in answer.json()["error"]["message"]
    finally:
        running.close()
