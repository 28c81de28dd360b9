"""What the web app's events do with what its page would never send."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from diptych import Student
from diptych.serve import app as web_app
from diptych.serve.config import ServerSettings
from serve.running import Running


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def app(student: Student, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(cache))
        patch.setattr(web_app, "SESSIONS", 8)
        running = Running(ServerSettings(folder=tmp_path_factory.mktemp("app")), student, web_app=True)
        yield running
        running.close()


def send(app: Running, event: dict[str, Any], session: str = "abc") -> tuple[int, str]:
    """The status of an event, and what came of it."""
    with httpx.Client(base_url=f"{app.url}/app/gradio_api", timeout=60) as client:
        answer = client.post("/queue/join", json={"session_hash": session, "trigger_id": None, **event})
        if answer.status_code != 200:
            return answer.status_code, answer.text
        return 200, client.get("/queue/data", params={"session_hash": session}).text


def enhance(app: Running) -> dict[str, Any]:
    """The event of the Create tab that asks for a longer prompt: two texts in, one out."""
    events = httpx.get(f"{app.url}/app/config", timeout=60).json()["dependencies"]
    return next(event for event in events if len(event["inputs"]) == 2 and len(event["outputs"]) == 1)


def test_no_event_makes_a_file_of_this_machine_a_file_of_the_app(app: Running, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    number = enhance(app)["id"]
    status, told = send(app, {"fn_index": number, "data": ["a cat", ""]})
    assert status == 200 and "process_completed" in told
    for path in (str(tmp_path / "secret.txt"), "http://127.0.0.1:1/x.png"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        for data in ([file, ""], ["a cat", [[file]]]):
            status, told = send(app, {"fn_index": number, "data": data})
            assert status == 400 and "objects" in told
    assert not [found for found in cache.rglob("*") if found.is_file()]


def test_what_is_no_text_is_refused_before_it_breaks_the_answer(app: Running) -> None:
    event = b'{"session_hash": "abc", "fn_index": %d, "data": ["\\ud800", ""]}' % enhance(app)["id"]
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{app.url}/app/gradio_api/queue/join", content=event, headers=headers, timeout=60)
    assert answer.status_code == 400 and "not text" in answer.json()["error"]["message"]


@pytest.mark.parametrize("number", [10**9, -1, "x", 1.5, True, [0]], ids=str)
def test_an_event_that_the_page_does_not_have_is_refused(app: Running, number: Any) -> None:
    assert send(app, {"fn_index": number, "data": []})[0] == 400


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b"\xff", b"[]", b'"x"', b" " * 2**21], ids=["deep", "bytes", "list", "text", "long"]
)
def test_a_body_that_is_no_event_is_refused(app: Running, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{app.url}/app/gradio_api/queue/join", content=body, headers=headers, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["code"] in ("request_invalid", "json_invalid")


@pytest.mark.parametrize("path", ["/app/gradio_api/queue/join", "/v1/references", "/v1/images/edits"])
def test_a_client_that_leaves_while_it_sends_is_no_error_in_the_log(
    app: Running, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    form = "Content-Type: multipart/form-data; boundary=X"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n{form}\r\n\r\n"
    with caplog.at_level(logging.WARNING):
        with socket.create_connection(("127.0.0.1", app.port)) as client:
            client.sendall(head.encode() + b"--X\r\n")
        time.sleep(0.3)
        assert httpx.get(f"{app.url}/healthz").status_code == 200
    assert caplog.records == []


def test_the_state_of_old_pages_is_let_go(app: Running) -> None:
    for number in range(12):
        assert send(app, {"fn_index": enhance(app)["id"], "data": ["a cat", ""]}, f"page-{number}")[0] == 200
    asgi: Any = app.server.config.app
    (gradio,) = [route.app for route in asgi.app.app.routes if getattr(route, "path", "") == "/app"]
    assert list(gradio.state_holder.session_data) == [f"page-{number}" for number in range(4, 12)]


def test_a_file_name_that_no_file_can_have_is_not_found(app: Running) -> None:
    for path in ("/app/assets/", "/app/static/", "/app/", "/v1/jobs/"):
        assert httpx.get(f"{app.url}{path}{'a' * 3000}", timeout=60).status_code == 404
