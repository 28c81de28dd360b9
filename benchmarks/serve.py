"""What the server costs and gains: HTTP over the library's own call, and batching under clients.

    python benchmarks/serve.py overhead [--rounds 30]          # minutes: the same picture both ways in turn
    python benchmarks/serve.py throughput [--clients 8]        # minutes: at --batch 1 and at --batch 8

Both use the shipped pocket model and a server in a process of its own. 50 clients with 500 requests are in
tests/soak/test_serve.py.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import measuring
import torch

from diptych import Student

ASKED: dict[str, Any] = {"prompt": "a cat on a beach", "steps": 8}
PER_CLIENT = 6  # requests


@contextmanager
def serving(batch: int) -> Iterator[str]:
    """The address of a server that is ready."""
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "diptych", "serve", "--no-app", "--port", "0", "--data", data]
        process = subprocess.Popen([*command, "--batch", str(batch)], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            if found := re.search(r"listening on (http://\S+),", line):
                url = found[1]
            if line.startswith("ready"):
                break
        try:
            yield url
        finally:
            process.terminate()
            process.wait(120)


def overhead(rounds: int) -> dict[str, Any]:
    """Milliseconds that a request takes beyond the library's call, which takes turns with it."""
    student = Student.load("pocket", progress_bar=False)
    seconds: dict[str, list[float]] = {"library": [], "http": []}
    with serving(1) as url, httpx.Client(base_url=url, timeout=120) as client:
        for number in range(-2, rounds):
            for way in ("library", "http") if number % 2 else ("http", "library"):
                started = time.perf_counter()
                if way == "http":
                    answer = client.post("/v1/images/generations", json={**ASKED, "seed": max(0, number)})
                    answer.raise_for_status()
                else:
                    student.generate(None, ASKED["prompt"], seed=max(0, number), steps=ASKED["steps"])
                if number >= 0:
                    seconds[way].append(time.perf_counter() - started)
    median = {way: statistics.median(found) for way, found in seconds.items()}
    return {"seconds": median, "overhead_ms": round(1000 * (median["http"] - median["library"]), 2), "rounds": rounds}


def throughput(clients: int) -> dict[str, Any]:
    """Pictures a second of that many clients at once, drawn one by one and together."""
    found: dict[str, float] = {}
    for batch in (1, 8):
        with serving(batch) as url:

            def ask(number: int, url: str = url) -> None:
                with httpx.Client(base_url=url, timeout=600) as client:
                    for n in range(PER_CLIENT):
                        asked = {**ASKED, "seed": PER_CLIENT * number + n}
                        client.post("/v1/images/generations", json=asked).raise_for_status()

            ask(0)
            with concurrent.futures.ThreadPoolExecutor(clients) as pool:
                started = time.perf_counter()
                list(pool.map(ask, range(clients)))
                found[f"batch_{batch}"] = round(clients * PER_CLIENT / (time.perf_counter() - started), 3)
    return {"clients": clients, "pictures_per_second": found, "gain": round(found["batch_8"] / found["batch_1"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["overhead", "throughput"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result = overhead(asked.rounds) if asked.what == "overhead" else throughput(asked.clients)
    about = {"about": measuring.about(torch.device("cpu"))}
    print(measuring.write(f"serve-{asked.what}", {**about, **result}, asked.out))
    print(result)


if __name__ == "__main__":
    main()
