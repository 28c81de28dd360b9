"""`diptych serve` as a process: it reports when it is ready, responds quickly, and survives a kill."""

from __future__ import annotations

import importlib.util
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
_spec: Any = importlib.util.spec_from_file_location("benchmark_serving", BENCHMARKS / "serving.py")
serving = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(serving)


def test_what_it_accepted_before_a_kill_it_draws_after_the_next_start(tmp_path: Path) -> None:
    with (
        serving.Server(tmp_path, "--no-app", "--batch", "2") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        seconds = []
        for _ in range(20):
            started = time.perf_counter()
            assert client.get("/v1/models").status_code == 200
            seconds.append(time.perf_counter() - started)
        assert statistics.median(seconds) < 0.035  # TCP that holds small packets back would take 40 ms or more

        asked = [{"prompt": "a cat", "seed": n, "steps": 4, "wait": False, "job": f"job-{n:04d}"} for n in range(6)]
        for one in asked:
            assert client.post("/v1/images/generations", json=one).status_code == 202
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        server.restart()
        again = [client.post("/v1/images/generations", json={**one, "wait": True}).json() for one in asked]
        assert [answer["data"][0]["seed"] for answer in again] == list(range(6))
        assert " local GET /v1/models 200 " in server.text() and "\nstopping" not in server.text()
        assert server.end() == 0 and not server.strays()
        assert re.findall(r"^(stopping on SIG\w+|stopped)", server.text(), re.MULTILINE) == [
            "stopping on SIGTERM",
            "stopped",
        ]


def test_a_model_that_is_not_there_ends_it_with_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diptych", "serve", "--no-app", "--port", "0", "--data", str(tmp_path / "data")]
    ended = subprocess.run(
        [*command, "--model", str(tmp_path / "nowhere")], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2 and "nowhere" in ended.stderr and "Traceback" not in ended.stderr
