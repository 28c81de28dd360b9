"""Who asks: wrong tokens harm nobody but who sends them, proxies are named, sessions end, and pages are apart."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from diptych import Student
from diptych.errors import UsageError
from diptych.serve.auth import Authenticator
from diptych.serve.config import Limits, ServerSettings
from raising import raises
from serve.running import TOKENS, Running

ANA, BEN = ({"Authorization": f"Bearer {TOKENS[name]}"} for name in ("ana", "ben"))
WRONG = {"Authorization": "Bearer nobody-knows-this"}


@pytest.fixture(scope="module")
def shared(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with the app, and few guesses for everybody behind one address."""
    folder = tmp_path_factory.mktemp("shared")
    running = Running(ServerSettings(folder=folder, tokens=TOKENS, limits=Limits(guesses=5)), student, web_app=True)
    yield running
    running.close()


def test_wrong_tokens_lock_out_nobody_who_has_a_right_one(shared: Running) -> None:
    found = [httpx.get(f"{shared.url}/v1/jobs", headers=WRONG).status_code for _ in range(8)]
    assert found[0] == 401 and found[-1] == 429
    assert httpx.post(f"{shared.url}/login", data={"token": "wrong"}).status_code == 429  # both ways count together
    assert httpx.get(f"{shared.url}/v1/jobs", headers=ANA).status_code == 200
    entered = httpx.post(f"{shared.url}/login", data={"token": TOKENS["ben"]})
    assert entered.status_code == 303
    assert httpx.get(f"{shared.url}/v1/jobs", cookies=entered.cookies).status_code == 200
    assert httpx.get(f"{shared.url}/v1/jobs").status_code == 401  # without a token, nothing was guessed
    forwarded = [{**WRONG, "X-Forwarded-For": f"10.0.0.{n}", "X-Real-IP": f"10.0.0.{n}"} for n in range(3)]
    answers = [httpx.get(f"{shared.url}/v1/jobs", headers=each).status_code for each in forwarded]
    assert answers == [429] * 3  # the header comes from an untrusted address


def test_proxies_that_are_named_are_believed(student: Student, tmp_path: Path) -> None:
    limits = Limits(guesses=2)
    settings = ServerSettings(folder=tmp_path, tokens=TOKENS, limits=limits, proxies=("127.0.0.1", "10.1.0.0/16"))
    running = Running(settings, student)

    def guess(forwarded: str) -> int:
        headers = {**WRONG, "X-Forwarded-For": forwarded}
        return httpx.get(f"{running.url}/v1/jobs", headers=headers).status_code

    try:
        assert [guess("192.0.2.1") for _ in range(3)] == [401, 401, 429]
        assert guess("192.0.2.2") == 401
        assert guess("198.51.100.9, 192.0.2.1, 10.1.2.3") == 429  # the last that no proxy of ours has written
        secure = {"X-Forwarded-Proto": "https"}
        entered = httpx.post(f"{running.url}/login", data={"token": TOKENS["ana"]}, headers=secure)
        assert "Secure" in entered.headers["set-cookie"]
    finally:
        running.close()


@pytest.mark.parametrize("proxy", ["*", "proxy.example.org", "", "10.0.0.0/99"])
def test_a_proxy_is_an_address(tmp_path: Path, proxy: str) -> None:
    with raises("server_config_invalid", "--trusted-proxy", kind=UsageError):
        ServerSettings(folder=tmp_path, proxies=(proxy,))


def test_addresses_of_one_ipv6_network_are_one_client() -> None:
    gate = Authenticator(TOKENS, guesses=1)
    assert gate.guessed("2001:db8::1") == 0 and gate.guessed("2001:db8::2") > 0
    assert gate.guessed("2001:db8:0:1::1") == 0 and gate.guessed("192.0.2.1") == 0 and gate.guessed("192.0.2.2") == 0


def test_logging_out_ends_the_session_everywhere_and_after_a_restart(student: Student, tmp_path: Path) -> None:
    settings = ServerSettings(folder=tmp_path, tokens=TOKENS)
    running = Running(settings, student)
    ended, open_ = (httpx.post(f"{running.url}/login", data={"token": TOKENS["ana"]}).cookies for _ in range(2))
    try:
        assert httpx.get(f"{running.url}/v1/jobs", cookies=ended).status_code == 200
        assert httpx.post(f"{running.url}/logout", cookies=ended).status_code == 303
        for cookies, status in ((ended, 401), (open_, 200)):
            assert httpx.get(f"{running.url}/v1/jobs", cookies=cookies).status_code == status
    finally:
        running.close()
    running = Running(settings, student)
    try:
        for cookies, status in ((ended, 401), (open_, 200)):
            assert httpx.get(f"{running.url}/v1/jobs", cookies=cookies).status_code == status
    finally:
        running.close()


def test_nobody_reads_or_stops_the_events_of_anothers_page(shared: Running) -> None:
    api = f"{shared.url}/app/gradio_api"
    events = httpx.get(f"{shared.url}/app/config", headers=ANA, timeout=60).json()["dependencies"]
    number = next(event["id"] for event in events if len(event["inputs"]) == 2 and len(event["outputs"]) == 1)
    event = {"session_hash": "of-ana", "trigger_id": None, "fn_index": number, "data": ["a cat", ""]}
    assert httpx.post(f"{api}/queue/join", json=event, headers=ANA, timeout=60).status_code == 200
    session = {"session_hash": "of-ana"}
    assert httpx.get(f"{api}/queue/data", params=session, headers=BEN, timeout=60).status_code == 404
    guessed = {"session_hash": "ana:of-ana"}
    assert httpx.get(f"{api}/queue/data", params=guessed, headers=BEN, timeout=60).status_code == 404
    assert "process_completed" in httpx.get(f"{api}/queue/data", params=session, headers=ANA, timeout=60).text


def test_a_page_that_reads_nothing_is_sent_no_more(shared: Running) -> None:
    api = f"{shared.url}/app/gradio_api"
    events = httpx.get(f"{shared.url}/app/config", headers=ANA, timeout=60).json()["dependencies"]
    number = next(event["id"] for event in events if len(event["inputs"]) == 2 and len(event["outputs"]) == 1)
    event = {"session_hash": "deaf", "trigger_id": None, "fn_index": number, "data": ["a cat", ""]}
    with httpx.Client(headers=ANA, timeout=60) as client:
        found = [client.post(f"{api}/queue/join", json=event).status_code for _ in range(60)]
        assert found[0] == 200 and found[-1] == 429
        other = client.post(f"{api}/queue/join", json={**event, "session_hash": "another-page"})
        assert other.status_code == 200


def test_a_body_with_two_ends_closes_the_connection(guarded: Running) -> None:
    head = f"POST /v1/references HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKENS['ana']}\r\n"
    both = "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    smuggled = "GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=30) as client:
        client.sendall((head + both + smuggled).encode())
        answer = b""
        while part := client.recv(10_000):
            answer += part
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("generations", b'{"prompt": "a cat", "steps": 1, "prompt": "a dog"}'),
        ("edits", b'{"prompt": "a cat", "images": [{"image_url": "YQ==", "image_url": "YQ=="}]}'),
        ("generations", b'{"prompt": "a cat", "steps": 1, "\\u0073teps": 2}'),
        ("generations", b'{"prompt": "a cat", "guidance": NaN}'),
    ],
)
def test_json_that_two_readers_could_understand_differently_is_refused(
    client: httpx.Client, path: str, body: bytes
) -> None:
    answer = client.post(f"/v1/images/{path}", content=body, headers={"Content-Type": "application/json"})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and ("twice" in message or "NaN" in message)


@pytest.mark.parametrize("body", [b'{"prompt": "a cat", "steps": "\\ud800"}', b'{"prompt": "a cat", "\\udfff": 1}'])
def test_what_is_no_text_is_refused_with_an_answer_that_is(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/v1/images/generations", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_json_is_sent_as_json(client: httpx.Client) -> None:
    for kind in ("text/plain", "application/xml", "application/x-www-form-urlencoded"):
        answer = client.post("/v1/images/generations", content=b'{"prompt": "a cat"}', headers={"Content-Type": kind})
        assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]


def test_prompts_are_in_no_log_and_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diptych", "serve", "--no-app", "--port", str(port), "--data", str(tmp_path)]
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stderr=log, stdout=log)
    try:
        until = time.monotonic() + 120
        while "\nready: " not in (tmp_path / "log").read_text():
            assert time.monotonic() < until and server.poll() is None
            time.sleep(0.05)
        asked: dict[str, Any] = {"prompt": "a zyzzyva " + "on the quixotry " * 100, "steps": 1}
        answer = httpx.post(f"{url}/v1/images/generations", json=asked, timeout=60)
        assert answer.status_code == 200 and len(answer.json()["warnings"]) == 2
        long = {**asked, "steps": 100, "n": 10, "wait": False, "size": "64x64"}
        job = httpx.post(f"{url}/v1/images/generations", json=long, timeout=60).json()["id"]
        while not httpx.get(f"{url}/v1/jobs/{job}").json()["progress"]["step"]:
            time.sleep(0.05)
        server.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.poll() is None  # the batch in hand is being finished
        server.send_signal(signal.SIGINT)
        assert server.wait(2) == 128 + signal.SIGINT
        said = (tmp_path / "log").read_text()
        assert "zyzzyva" not in said and "quixotry" not in said and "stopped at once" in said
    finally:
        server.kill()
        server.wait()
