"""Many clients of one server, undisturbed and killed in between: what is lost, and how much memory it uses.

    python benchmarks/serve_load.py [--clients 50] [--requests 500] [--kills 2]      # some minutes

Each client requests one image after the other, each with a name, every fifth without waiting. After 429 or 503 a client
tries again after `Retry-After`, and after a broken connection it sends its request again. In the first load nothing is
killed, and memory is measured. In the second the server gets SIGKILL at even distances and is started again.
"""

from __future__ import annotations

import argparse
import base64
import collections
import concurrent.futures
import hashlib
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import httpx
import measuring
import torch
from serving import Server

QUEUE = 24  # images that may wait: fewer than clients, so that some are rejected
PATIENCE = 1800  # seconds until a client gives up
STEPS = 4
MIB = 2**20


class Load:
    """The outcomes of the requests so far."""

    def __init__(self, url: str, clients: int, requests: int) -> None:
        self.url, self.clients, self.requests = url, clients, requests
        self.statuses: collections.Counter[str] = collections.Counter()
        self.pictures: dict[int, str] = {}  # seed → hash of its image
        self.failed: dict[int, str] = {}
        self.until = time.monotonic() + PATIENCE

    @property
    def ended(self) -> int:
        return len(self.pictures) + len(self.failed)

    def client(self, number: int) -> None:
        """Requests every image of this client."""
        with httpx.Client(base_url=self.url, timeout=120) as client:
            for seed in range(number, self.requests, self.clients):
                self._ask(client, seed)

    def _ask(self, client: httpx.Client, seed: int) -> None:
        job = f"load-{seed:05d}"
        body = {"prompt": "a cat on a beach", "seed": seed, "steps": STEPS, "job": job, "wait": seed % 5 > 0}
        answer = self._send(client, "POST", "/v1/images/generations", body)
        while answer.status_code == 202 or answer.status_code == 409:  # accepted; polled until it has ended
            time.sleep(0.2)
            answer = self._send(client, "GET", f"/v1/jobs/{job}/images")
        job_state = answer.json()
        if answer.status_code != 200:
            self.failed[seed] = job_state["error"]["message"]
            return
        (image,) = job_state["data"]
        assert job_state["job"] == job and image["seed"] == seed, f"{job} got the image of {job_state['job']}"
        self.pictures[seed] = hashlib.sha256(base64.b64decode(image["b64_json"])).hexdigest()

    def _send(self, client: httpx.Client, method: str, path: str, body: Any = None) -> httpx.Response:
        """Sends a request until it is answered with something else than "later"."""
        while time.monotonic() < self.until:
            try:
                answer = client.request(method, path, json=body)
            except httpx.TransportError:  # the server was killed
                self.statuses["broken"] += 1
                time.sleep(0.5)
                continue
            self.statuses[str(answer.status_code)] += 1
            if answer.status_code not in (429, 503):
                return answer
            time.sleep(int(answer.headers.get("retry-after", 1)))
        raise TimeoutError(f"{method} {path}: not answered in {PATIENCE} s")


def under_load(clients: int, requests: int, kills: int, folder: Path) -> dict[str, Any]:
    """Runs one server with its clients. AssertionError for a lost or wrong image, RuntimeError if the server ends."""
    started = time.monotonic()
    with Server(folder, "--no-app", "--queue", str(QUEUE)) as server:
        load = Load(server.url, clients, requests)
        resident: list[tuple[int, int]] = []  # (requests that have ended, bytes) as time goes by
        left = [requests * (n + 1) // (kills + 1) for n in range(kills)]
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            asking = [pool.submit(load.client, number) for number in range(clients)]
            while not all(client.done() for client in asking):
                resident.append((load.ended, server.memory()))
                if left and load.ended >= left[0]:
                    del left[0]
                    assert server.end(signal.SIGKILL) == -signal.SIGKILL
                    print(f"killed after {load.ended} images", flush=True)
                    server.restart()
                time.sleep(0.1)
            for client in asking:
                client.result()
        seconds = time.monotonic() - started
        with httpx.Client(base_url=server.url, timeout=60) as client:
            waiting = client.get("/metrics").text.partition("\ndiptych_queue_pictures ")[2].partition("\n")[0]
        assert float(waiting) == 0, f"{waiting} images still wait"
        assert load.ended == requests, f"{requests - load.ended} requests were lost"
        assert len(set(load.pictures.values())) == len(load.pictures), "two clients got one image"
        assert not [status for status in load.statuses if status[0] == "5" and status != "503"], load.statuses
        assert server.end() == 0 and not server.strays() and "Traceback" not in server.text()
    found: dict[str, Any] = {
        "kills": kills - len(left),
        "pictures": len(load.pictures),
        "reported_failed": load.failed,
        "answers": dict(sorted(load.statuses.items())),
        "seconds": round(seconds, 1),
    }
    return found if kills else {**found, **_memory(resident, requests)}


def _memory(resident: list[tuple[int, int]], requests: int) -> dict[str, Any]:
    """Median MiB in each tenth of the requests, and the growth from the second tenth, which is warm, to the last."""
    tenths = [
        statistics.median([size for ended, size in resident if n <= 10 * ended / requests < n + 1 and size] or [0])
        / MIB
        for n in range(10)
    ]
    return {"mib_by_tenth": [round(size) for size in tenths], "grown_mib": round(tenths[-1] - tenths[1], 1)}


def run(clients: int, requests: int, kills: int, out: Path | None = None) -> dict[str, Any]:
    """Both loads, and their result file."""
    with tempfile.TemporaryDirectory() as folder:
        alone = under_load(clients, requests, 0, Path(folder) / "alone")
        print(alone, flush=True)
        killed = under_load(clients, requests, kills, Path(folder) / "killed")
    found = {
        "about": measuring.about(torch.device("cpu")),
        "clients": clients,
        "requests": requests,
        "steps": STEPS,
        "queue": QUEUE,
        "alone": alone,
        "killed": killed,
    }
    print(measuring.write("serve-load", found, out))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    print(run(given.clients, given.requests, given.kills, given.out)["killed"])


if __name__ == "__main__":
    main()
