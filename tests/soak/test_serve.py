"""`diptych serve` as a process of its own: killed in the middle, started again; and many clients at once."""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.soak


class Process:
    """A server with the shipped model."""

    def __init__(self, data: Path, *options: str) -> None:
        command = [sys.executable, "-m", "diptych", "serve", "--no-app", "--port", "0", "--data", str(data), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.url = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"listening on (http://\S+),", line):
                self.url = found[1]
            if line.startswith("ready"):
                return
        raise AssertionError("the server ended before it was ready")

    def memory(self) -> int:
        """Bytes resident."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def end(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(120)


def test_what_was_accepted_is_drawn_after_a_kill(tmp_path: Path) -> None:
    server = Process(tmp_path, "--batch", "2")
    asked = [{"prompt": "a cat", "seed": n, "steps": 8, "wait": False, "job": f"job-{n:04d}"} for n in range(12)]
    with httpx.Client(timeout=120) as client:
        for one in asked:
            assert client.post(f"{server.url}/v1/images/generations", json=one).status_code == 202
        time.sleep(1)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        server = Process(tmp_path, "--batch", "2")
        until = time.monotonic() + 600
        ends: dict[str, str] = {}
        while len(ends) < len(asked) and time.monotonic() < until:
            for one in asked:
                state = client.get(f"{server.url}/v1/jobs/{one['job']}").json()
                if state["status"] in ("done", "failed"):
                    ends[one["job"]] = state["status"]
            time.sleep(0.5)
        assert set(ends) == {one["job"] for one in asked} and set(ends.values()) == {"done"}
        again = client.post(f"{server.url}/v1/images/generations", json={**asked[0], "wait": True}).json()
        assert again["data"][0]["seed"] == 0  # sent again under its name: the picture that is there
    assert server.end() == 0


def test_fifty_clients_that_come_again_when_told_get_all_their_pictures(tmp_path: Path) -> None:
    server = Process(tmp_path, "--queue", "24")
    refused = 0

    def ask(client_number: int) -> list[int]:
        nonlocal refused
        got = []
        with httpx.Client(timeout=600) as client:
            for n in range(10):
                seed = 10 * client_number + n
                one: dict[str, Any] = {"prompt": "a cat on a beach", "seed": seed, "steps": 1}
                while (answer := client.post(f"{server.url}/v1/images/generations", json=one)).status_code == 429:
                    refused += 1
                    time.sleep(int(answer.headers["retry-after"]))
                got.append(answer.json()["data"][0]["seed"])
        return got

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        first = pool.submit(ask, 0).result()
        before = server.memory()
        seeds = [*first, *(seed for found in pool.map(ask, range(1, 50)) for seed in found)]
    after = server.memory()
    assert sorted(seeds) == list(range(500)) and refused > 0
    assert after - before < 150 * 2**20, f"{(after - before) / 2**20:.0f} MiB more after 490 pictures"
    assert server.end() == 0
