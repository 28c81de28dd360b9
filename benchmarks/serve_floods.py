"""Eight normal clients and one that floods the server: how long the normal ones wait, and whether anything is lost.

    python benchmarks/serve_floods.py [--seconds 10]      # some minutes

Every client has a separate token. The normal clients send references, start jobs of one image, watch them and fetch the
results. The time of each answer counts, not that of generation. During each flood all of their requests must succeed
within `LIMIT` seconds, and every job must end. At the end the worker's thread is killed, and `/readyz` must report
that, and report when another thread works.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import io
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import httpx
import measuring
import torch
from PIL import Image
from serving import Server

from diptych.utils.paths import packaged

CLIENTS = 8
LIMIT = 2.0  # seconds until an honest request is answered
TRUTH = 5.0  # seconds until /readyz knows
FLOODER = {"Authorization": "Bearer flooder-0123456789abcdef"}
KILLABLE = """
import ctypes, signal, sys, threading
def kill(number, frame):
    for thread in threading.enumerate():
        if thread.name == "diptych-worker":
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
signal.signal(signal.SIGUSR1, kill)
from diptych.cli.app import main
sys.exit(main())
"""


class Flood:
    """A flood of requests by many threads at once, until it is stopped."""

    def __init__(self, server: Server, act: Callable[[Flood, httpx.Client], None], threads: int) -> None:
        self.server, self.act, self.threads = server, act, threads
        self.statuses: collections.Counter[str] = collections.Counter()
        self.stopped = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self.server.url, headers=FLOODER, timeout=120) as client:
            while not self.stopped.is_set():
                try:
                    self.act(self, client)
                except httpx.TransportError:
                    self.statuses["broken"] += 1

    def post(self, client: httpx.Client, path: str, **body: Any) -> None:
        self.statuses[str(client.post(path, **body).status_code)] += 1

    @contextlib.contextmanager
    def going(self) -> Any:
        threads = [threading.Thread(target=self.run) for _ in range(self.threads)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stopped.set()
            for thread in threads:
                thread.join()


MANY = b'{"prompt": "a cat", ' + b",".join(b'"k%d":1' % number for number in range(500_000)) + b"}"


def keys(flood: Flood, client: httpx.Client) -> None:
    """JSON of half a million unknown keys."""
    flood.post(client, "/v1/images/generations", content=MANY, headers={"Content-Type": "application/json"})


def uploads(flood: Flood, client: httpx.Client) -> None:
    """Images of 24 megapixels, some hundred kilobytes each."""
    flood.post(client, "/v1/references", content=LARGE)


def queue(flood: Flood, client: httpx.Client) -> None:
    """Jobs of ten images each, as many as the server accepts."""
    flood.post(client, "/v1/images/generations", json={"prompt": "a dog", "n": 10, "steps": 20, "wait": False})


def silence(flood: Flood, client: httpx.Client) -> None:
    """1,010 connections that send nothing."""
    held = []
    try:
        for _ in range(1010):
            with contextlib.suppress(OSError):
                held.append(socket.create_connection(("127.0.0.1", flood.server.port), 10))
        flood.statuses["connections"] += len(held)
        flood.stopped.wait(5)
    finally:
        for connection in held:
            connection.close()


def unread(flood: Flood, client: httpx.Client) -> None:
    """Events of the app whose answers are not read."""
    events = client.get("/app/config").json()["dependencies"]
    number = next(event["id"] for event in events if len(event["inputs"]) == 2 and len(event["outputs"]) == 1)
    for session in range(50):
        event = {"session_hash": f"page-{session}", "trigger_id": None, "fn_index": number, "data": ["a cat", ""]}
        flood.post(client, "/app/gradio_api/queue/join", json=event)


def bodies(flood: Flood, client: httpx.Client) -> None:
    """Bodies that never end, in a few hundred requests."""
    head = "POST /v1/references HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 20000000\r\n"
    head += f"Authorization: {FLOODER['Authorization']}\r\n\r\n"
    held = []
    try:
        for _ in range(400):
            with contextlib.suppress(OSError):
                held.append(socket.create_connection(("127.0.0.1", flood.server.port), 10))
                held[-1].sendall(head.encode() + b"x" * 100_000)
        flood.statuses["connections"] += len(held)
        flood.stopped.wait(5)
    finally:
        for connection in held:
            connection.close()


def _large() -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((4900, 4900)).convert("RGB").save(out, "JPEG", quality=60)
    return out.getvalue()


LARGE = _large()
CAT = (packaged("examples/references") / "cat.png").read_bytes()
FLOODS: dict[str, tuple[Callable[[Flood, httpx.Client], None], int]] = {
    "none": (lambda flood, client: time.sleep(0.1), 1),
    "keys": (keys, 4),
    "uploads": (uploads, 48),
    "queue": (queue, 4),
    "silence": (silence, 1),
    "unread": (unread, 4),
    "bodies": (bodies, 1),
}


class Honest:
    """One client: its requests, the time of each answer, and the jobs that have not ended."""

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name
        self.seconds: list[float] = []
        self.wrong: collections.Counter[str] = collections.Counter()
        self.jobs: list[str] = []
        self.ended = 0

    def ask(self, client: httpx.Client, method: str, path: str, **body: Any) -> httpx.Response:
        started = time.perf_counter()
        answer = client.request(method, path, **body)
        self.seconds.append(time.perf_counter() - started)
        if not answer.is_success:
            self.wrong[f"{method} {path.partition('?')[0][:30]} {answer.status_code}"] += 1
        return answer

    def run(self, until: float) -> None:
        headers = {"Authorization": f"Bearer {self.name}-0123456789abcdef"}
        with httpx.Client(base_url=self.server.url, headers=headers, timeout=120) as client:
            while time.monotonic() < until:
                self.ask(client, "POST", "/v1/references", content=CAT)
                job = f"{self.name}-{time.monotonic_ns()}"
                body = {"prompt": "a cat", "steps": 4, "seed": 1, "wait": False, "job": job}
                if not self.ask(client, "POST", "/v1/images/generations", json=body).is_success:
                    continue
                self.jobs.append(job)
                patience = time.monotonic() + 120
                while time.monotonic() < patience:
                    state = self.ask(client, "GET", f"/v1/jobs/{job}").json()
                    if state["status"] in ("done", "failed", "cancelled"):
                        self.ended += state["status"] == "done"
                        self.ask(client, "GET", f"/v1/pictures/{state['pictures'][0]['id']}")
                        break
                    time.sleep(0.1)


def beside(server: Server, name: str, seconds: float) -> dict[str, Any]:
    """The answers to the normal clients during one flood."""
    act, threads = FLOODS[name]
    flood, honest = Flood(server, act, threads), [Honest(server, f"honest{n}") for n in range(CLIENTS)]
    with flood.going(), concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        time.sleep(0.5)
        until = time.monotonic() + seconds
        for done in [pool.submit(one.run, until) for one in honest]:
            done.result()
    taken = sorted(second for one in honest for second in one.seconds)
    jobs, ended = sum(len(one.jobs) for one in honest), sum(one.ended for one in honest)
    return {
        "answers": len(taken),
        "median_ms": round(1e3 * taken[len(taken) // 2]),
        "p99_ms": round(1e3 * taken[int(0.99 * len(taken))]),
        "slowest_ms": round(1e3 * taken[-1]),
        "refused": dict(sum((one.wrong for one in honest), collections.Counter())),
        "jobs": jobs,
        "lost": jobs - ended,
        "flood": dict(sorted(flood.statuses.items())),
        "mib": round(server.memory() / 2**20),
    }


def truth(server: Server) -> dict[str, float]:
    """Seconds until /readyz reports that the worker died, and until it reports that another one works."""
    found, started = {}, time.monotonic()
    server.process.send_signal(signal.SIGUSR1)
    for name, status in (("death_s", 503), ("return_s", 200)):
        while httpx.get(f"{server.url}/readyz", timeout=30).status_code != status:
            assert time.monotonic() - started < 2 * TRUTH, f"/readyz does not say {status}"
            time.sleep(0.02)
        found[name] = round(time.monotonic() - started, 2)
        started = time.monotonic()
    return found


def run(seconds: float, out: Path | None = None) -> dict[str, Any]:
    """All floods, and their result file; `problems` lists the failures."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = ["flooder", *(f"honest{n}" for n in range(CLIENTS))]
        tokens = folder / "tokens"
        tokens.write_text("".join(f"{name} {name}-0123456789abcdef\n" for name in names))
        tokens.chmod(0o600)
        options = ("--token-file", str(tokens), "--rate", "0", "--log-level", "error")
        with Server(folder / "server", *options, script=KILLABLE) as server:
            floods = {}
            for name in FLOODS:
                floods[name] = beside(server, name, seconds)
                print(name, floods[name], flush=True)
            ready = truth(server)
            assert server.end() == 0
    problems = [
        f"beside {name}: {one['slowest_ms']} ms" for name, one in floods.items() if one["slowest_ms"] > 1e3 * LIMIT
    ]
    problems += [f"beside {name}: refused {one['refused']}" for name, one in floods.items() if one["refused"]]
    problems += [f"beside {name}: {one['lost']} jobs lost" for name, one in floods.items() if one["lost"]]
    problems += [f"/readyz: {name} {value}" for name, value in ready.items() if value > TRUTH]
    found = {
        "about": measuring.about(torch.device("cpu")),
        "clients": CLIENTS,
        "seconds": seconds,
        "limit_ms": round(1e3 * LIMIT),
        "floods": floods,
        "readyz": ready,
        "problems": problems,
    }
    print(measuring.write("serve-floods", found, out))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = run(given.seconds, given.out)
    print(*found["problems"], sep="\n")
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
