"""A server under malformed requests: no answer is a server error, nothing is served without a token, no stray file.

    python benchmarks/serve_fuzz.py [--requests 5000] [--seed 0]      # some minutes

Every request of malformed.py is sent twice: with a token, and with none or a wrong one. The server is a separate
process with the web app and a folder of runs. Python's audit hook reports the files that it opens to write. At the end
the server must generate the same image as before. tests/serve/test_schema.py has requests made from the server's
OpenAPI description.
"""

from __future__ import annotations

import argparse
import base64
import collections
import concurrent.futures
import http.client
import io
import itertools
import re
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent))

import httpx
import measuring
import torch
from malformed import Case, Maker
from PIL import Image
from serving import Server

TOKEN = "fuzzing-0123456789abcdef"
OPEN = ("/healthz", "/readyz", "/login")
SENDERS = 8
ANSWERED = 60.0  # seconds until an answer must have begun
LISTEN = 1.0  # seconds that a stream is listened to
SAID = 12  # problems that are described in full


class Fuzz:
    """The outcomes of the requests so far."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.lock = threading.Lock()
        self.statuses: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.problems: list[str] = []
        self.sent = self.served = 0

    def try_(self, number: int, case: Case) -> None:
        """Sends a case with a token, and without."""
        host = f"127.0.0.1:{self.server.port}"
        wrong = f"Authorization: Bearer wrong-{number}\r\nX-Forwarded-For: 10.{number >> 8 & 255}.{number & 255}.1"
        for authorization in (f"Authorization: Bearer {TOKEN}", wrong if number % 4 == 0 else ""):
            let_in = TOKEN in authorization
            status = self.send(case.wire(host, authorization), ended=bool(case.raw))
            with self.lock:
                self.sent += 1
                self.statuses[case.kind][f"{status}" if let_in else f"{status} without token"] += 1
            if status >= 500 or (status == 0 and not case.raw):
                self.problem(number, case, f"answered {status}")
            if not let_in and 200 <= status < 300 and urlsplit(case.target).path not in OPEN:
                self.served += 1
                self.problem(number, case, f"served without a token: {status}")
            if let_in and case.session and status == 200:
                path = f"/app/gradio_api/queue/data?session_hash={case.session}"
                if self.send(Case("", target=path).wire(host, authorization)) >= 500:
                    self.problem(number, case, "its events could not be read")

    def send(self, wire: bytes, ended: bool = False) -> int:
        """The status of the answer, or 0 if there is none. A stream is read for a moment."""
        try:
            with socket.create_connection(("127.0.0.1", self.server.port), ANSWERED) as connection:
                try:
                    connection.sendall(wire)
                    if ended:  # no body that it may wait for comes any more
                        connection.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # refused while it was sent; the answer may be there
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                status, until = answer.status, time.monotonic() + LISTEN
                connection.settimeout(LISTEN)
                try:
                    while answer.read1(2**16) and time.monotonic() < until:
                        pass
                except (OSError, http.client.HTTPException):
                    pass
                return status
        except (OSError, http.client.HTTPException):
            return 0

    def problem(self, number: int, case: Case, what: str) -> None:
        with self.lock:
            request = (
                case.raw[:200] if case.raw else f"{case.method} {case.target[:150]} {case.headers} {case.body[:300]!r}"
            )
            self.problems.append(
                f"{number}: {case.kind}: {what}: {request}" if len(self.problems) < SAID else f"{number}: {what}"
            )


def run(requests: int, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Sends all requests and writes the result file; `problems` lists the failures."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "runs" / "run").mkdir(parents=True)
        (folder / "runs" / "run" / "recipe.yaml").write_text("name: run\n")
        (folder / "tokens").write_text(f"fuzz {TOKEN}\n")
        options = (
            "--token-file",
            str(folder / "tokens"),
            "--runs",
            str(folder / "runs"),
            "--rate",
            "0",
            "--trusted-proxy",
            "127.0.0.1",
            "--queue",
            "16",
        )
        with Server(folder / "server", *options, audited=True) as server:
            known = httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120)
            body = {"prompt": "a cat", "seed": 1, "steps": 4}
            first = known.post("/v1/images/generations", json=body).raise_for_status().json()
            sizes, started = [server.memory()], time.monotonic()
            fuzz, maker = Fuzz(server), Maker(seed, known.get("/app/config").raise_for_status().json())
            cases = [(number, maker.case()) for number in range((requests + 1) // 2)]
            for half in (cases[: len(cases) // 2], cases[len(cases) // 2 :]):
                with concurrent.futures.ThreadPoolExecutor(SENDERS) as pool:
                    list(pool.map(lambda numbered: fuzz.try_(*numbered), half))
                sizes.append(server.memory())
            seconds = time.monotonic() - started
            while (again := known.post("/v1/images/generations", json=body)).status_code == 429:
                time.sleep(int(again.headers["retry-after"]))
            if pixels(again.json()) != pixels(first):
                fuzz.problems.append(
                    f"afterwards it generated no image, or another one: {again.status_code} {again.text[:200]}"
                )
            known.close()
            if code := server.end():
                fuzz.problems.append(f"it ended with {code}")
            traced, ours = tracebacks(server.text())
            fuzz.problems += [f"in the log: {' '.join(trace[-600:].split())}" for trace in ours[:SAID]]
            if fuzz.problems and out is not None:
                out.with_suffix(".log").write_text(server.text())
            fuzz.problems += [f"a stray file: {name}" for name in server.strays()]
            fuzz.problems += [f"written outside the data: {line}" for line in outside(server)]
    found = {
        "about": measuring.about(torch.device("cpu")),
        "requests": fuzz.sent,
        "seed": seed,
        "seconds": round(seconds, 1),
        "statuses": {kind: dict(sorted(counted.items())) for kind, counted in sorted(fuzz.statuses.items())},
        "served_without_token": fuzz.served,
        "refused_by_gradio": traced - len(ours),
        "grown_mib_by_half": [round((after - before) / 2**20, 1) for before, after in itertools.pairwise(sizes)],
        "problems": fuzz.problems,
    }
    print(measuring.write("serve-fuzz", found, out))
    return found


def tracebacks(log: str) -> tuple[int, list[str]]:
    """The number of tracebacks in a log, and those that are faults: the ones from a line of diptych.

    Gradio logs a traceback for requests that its checks reject, and for a stream of an unknown session. An answer that
    could not be sent because the client had closed the connection is not a fault either.
    """
    chained = log.replace("exception:\n\nTraceback", "exception:\n\nthen")
    traces = re.split(r"^(?=Traceback )", chained, flags=re.MULTILINE)[1:]
    known = re.compile(r"LocalProtocolError|in sse_stream\n")
    return len(traces), [trace for trace in traces if "/diptych/serve/" in trace and not known.search(trace)]


def pixels(answer: dict[str, Any]) -> list[bytes]:
    """Hashes of the pixels in an answer; the bytes also contain the job's name."""
    data = (base64.b64decode(image["b64_json"]) for image in answer.get("data", []))
    return [Image.open(io.BytesIO(one)).tobytes() for one in data]


def outside(server: Server) -> list[str]:
    """The files that the server opened to write, or made, outside its data folder after it was ready."""
    assert server.audit is not None
    lines = dict.fromkeys(server.audit.read_text(errors="replace").splitlines()[server.started :])
    data = str(server.folder / "data")
    harmless = ("/dev/", "/proc/self/")
    return [line for line in lines if not line.partition(" ")[2].startswith((data, *harmless))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = run(given.requests, given.seed, given.out)
    print(*found["problems"], sep="\n")
    print({name: value for name, value in found.items() if name not in ("about", "problems")})
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
