"""The audit page shows the sample without verdicts, accepts labels from this machine only, and loses none."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diptych.apps import audit
from diptych.apps.audit import AuditServer, serve
from diptych.data import labels
from diptych.data.store import Dataset


@pytest.fixture
def server(known: tuple[Path, dict[str, str]]) -> Iterator[AuditServer]:
    file = labels.Labels(known[0] / "audit" / "labels.jsonl")
    sample = audit.draw(known[0], 12, 0)
    server = AuditServer(sample, file, "me", {sample.pairs[0].id: "unsure"})
    thread = threading.Thread(target=serve, args=(server,))
    thread.start()
    yield server
    server.shutdown()
    thread.join(60)


def ask(server: AuditServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(
        method, path, data, {**kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    )
    answer = connection.getresponse()
    read = answer.status, answer.headers, answer.read()
    connection.close()
    return read


def test_the_page_serves_the_sample_and_nothing_that_tells_the_verdict(server: AuditServer) -> None:
    status, headers, page = ask(server, "GET", "/")
    assert (
        status == 200 and headers["Content-Type"].startswith("text/html") and server.url.startswith("http://127.0.0.1:")
    )
    assert not re.search(rb"(src|href)\s*=\s*[\"']?https?:", page), "the page must need nothing else"
    state = json.loads(ask(server, "GET", "/state")[2])
    assert [set(pair) for pair in state["pairs"]] == [{"id", "subject"}] * 12
    assert [pair["id"] for pair in state["pairs"]] == [pair.id for pair in server.sample.pairs]
    assert state["answers"] == {state["pairs"][0]["id"]: "unsure"} and "same individual" in state["question"]
    rows = {row["id"]: row for row in Dataset(server.sample.run / "candidates")}
    for pair in state["pairs"]:
        for side, column in (("reference", "conditioning"), ("target", "image")):
            status, headers, data = ask(server, "GET", f"/picture/{pair['id']}/{side}")
            assert (status, headers["Content-Type"]) == (200, "image/png")
            assert data == rows[pair["id"]][column]["bytes"] and headers["X-Content-Type-Options"] == "nosniff"


def test_labels_are_on_the_disk_when_the_page_hears_so(server: AuditServer) -> None:
    first, second = server.sample.pairs[1].id, server.sample.pairs[2].id
    for count, (id, label) in enumerate([(first, "same"), (second, "different"), (first, "unsure")]):
        status, _, answer = ask(server, "POST", "/label", {"id": id, "label": label})
        assert status == 200 and json.loads(answer)["done"] == (2, 3, 3)[count]
        assert labels.read(server.labels.path)["me"][id] == label
    row = json.loads(server.labels.path.read_bytes().splitlines()[0])
    assert set(row) == {"id", "label", "labeller", "time"}


def test_only_sampled_images_and_labels_are_accepted(server: AuditServer) -> None:
    drawn = {pair.id for pair in server.sample.pairs}
    other = next(row["id"] for row in Dataset(server.sample.run / "candidates").columns("id") if row["id"] not in drawn)
    for path in (
        f"/picture/{other}/target",
        "/picture/../../recipe.yaml/target",
        "/picture/%2e%2e%2frecipe.yaml/target",
    ):
        assert ask(server, "GET", path)[0] == 404
    for path in ("/recipe.yaml", "/audit/labels.jsonl", f"/picture/{server.sample.pairs[0].id}/evidence"):
        assert ask(server, "GET", path)[0] == 404
    good = server.sample.pairs[1].id
    wrong: list[Any] = [
        {"id": other, "label": "same"},
        {"id": good, "label": "maybe"},
        {"id": [good]},
        [1],
        b"{",
        b"x" * 20_000,
    ]
    for body in wrong:
        assert ask(server, "POST", "/label", body)[0] == 400
    assert not server.labels.path.exists()


def test_other_sites_are_rejected(server: AuditServer) -> None:
    body = {"id": server.sample.pairs[1].id, "label": "same"}
    assert ask(server, "GET", "/state", Host="evil.example")[0] == 403
    assert ask(server, "POST", "/label", body, Origin="https://evil.example")[0] == 403
    assert ask(server, "POST", "/label", json.dumps(body).encode(), Content_Type="text/plain")[0] == 415
    assert not server.labels.path.exists()
    assert ask(server, "POST", "/label", body, Origin=server.url.rstrip("/"))[0] == 200


def test_a_killed_session_has_every_label_and_the_next_one_reports(known: tuple[Path, dict[str, str]]) -> None:
    run, truth = known
    command = [sys.executable, "-m", "diptych", "data", "audit", str(run), "--sample", "10", "--serve"]

    def begin() -> tuple[subprocess.Popen[str], Any]:
        # A shell's background jobs ignore Ctrl-C and hand that down.
        hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear, env=dict(os.environ)
        )
        assert process.stderr is not None
        result = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stderr.readline())
        assert result is not None
        return process, type("Port", (), {"server_port": int(result[1])})

    process, port = begin()
    pairs = json.loads(ask(port, "GET", "/state")[2])["pairs"]
    for pair in pairs[:7]:
        assert ask(port, "POST", "/label", {"id": pair["id"], "label": truth[pair["id"]]})[0] == 200
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    process, port = begin()
    state = json.loads(ask(port, "GET", "/state")[2])
    assert state["answers"] == {pair["id"]: truth[pair["id"]] for pair in pairs[:7]}
    for pair in pairs[7:]:
        assert ask(port, "POST", "/label", {"id": pair["id"], "label": truth[pair["id"]]})[0] == 200
    assert ask(port, "POST", "/finish", {})[0] == 200
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "used        10" in out and "precision" in out
