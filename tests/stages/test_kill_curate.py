"""A run judged by a bad server and killed again and again: no pair is lost, and nothing is paid for twice but what was
under way."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import vlm_run
from coloured import opinion
from diptych.data import funnel
from diptych.data.bill import bill
from diptych.data.store import Dataset
from diptych.recipe import load
from llm.chat_server import Act, Call, Serve, refuse, say

CONCURRENCY, VOTES = 6, 2
TROUBLE: list[Callable[[Call], Act]] = [  # a fifth of the calls; all of it passes when tried again
    lambda call: refuse(429, "slow down", {"Retry-After": "0.02"}),
    lambda call: refuse(500, "oops"),
    lambda call: Act(b"", 503),
    lambda call: Act(hang_up=True),
    lambda call: Act(b"<html>\xff bad gateway, but 200"),
    lambda call: Act(say(opinion(True)).body[:60], missing=40),
]


class BadServer:
    """What it does with each call, and how often it has answered each question."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, call: Call) -> Act:
        key = hashlib.sha256(json.dumps(call.body["messages"]).encode()).hexdigest()
        with self._lock:
            self.tried[key] += 1
            draw = random.Random(f"{key} {self.tried[key]}")
        if draw.random() < 0.2:
            return draw.choice(TROUBLE)(call)
        with self._lock:
            self.answered[key] += 1
        # Of the pair, and the same each time: an undisturbed run has the same outcome.
        always = random.Random(json.dumps(call.body["messages"][:2])).random()
        if always < (0.2 if call.turns == 2 else 0.1):
            return say('{"same": tru')
        return say(opinion(always < 0.7, 1 + int(always * 100) % 5), delay=0.01)


def recipe_file(folder: Path, url: str, grids: int) -> Path:
    """A recipe that leaves nothing for torch to settle."""
    for name in ("teacher", "judge"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"name": name}))
    endpoint = {"base_url": url, "model": "tiny", "temperature": 0.7, "concurrency": CONCURRENCY}
    endpoint |= {"backoff": 0.005, "retries": 12, "timeout": 60.0, "input_price": 1.0, "output_price": 1.0}
    vlm = {"endpoint": endpoint, "votes": VOTES}
    curate = {"judge": f"{folder}/judge", "batch_size": 5, "thresholds": {"seam": -1}, "vlm": vlm}
    values = {"name": "killed", "teacher": f"{folder}/teacher", "device": "cpu", "threads": 1}
    values |= {"write": {"count": grids, "shard_size": 20}, "paint": {"dtype": "float32"}, "curate": curate}
    path = folder / "killed.yaml"
    path.write_text(json.dumps({**values, "distill": {"precision": "float32"}}))
    return path


def rows(run: Path) -> dict[str, bytes]:
    """The files that judging makes."""
    return {
        f"{name}/{path.name}": path.read_bytes() for name in ("candidates", "pairs") for path in (run / name).iterdir()
    }


@pytest.mark.parametrize(("grids", "kills"), [(40, 3), pytest.param(1000, 20, marks=pytest.mark.soak)])
def test_a_killed_judging_loses_no_pair_and_pays_again_for_at_most_the_calls_under_way(
    serve: Serve, tmp_path: Path, grids: int, kills: int
) -> None:
    bad = BadServer()
    server = serve(bad)
    recipe = recipe_file(tmp_path, server.url, grids)
    command = [sys.executable, vlm_run.__file__, str(recipe)]
    for kill in range(1, kills + 1):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
        until, wanted = time.monotonic() + 300, kill * grids * VOTES // (kills + 1)
        while bad.answered.total() < wanted:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL).returncode == 0

    candidates = list(Dataset(tmp_path / "killed" / "candidates"))
    assert len(candidates) == 2 * grids and Dataset(tmp_path / "killed" / "candidates").is_complete()
    votes = [vote for row in candidates for vote in json.loads(row["evidence"])["vlm"]["votes"]]
    assert len(votes) == 2 * grids * VOTES and {vote["status"] for vote in votes} == {"answered", "undecided"}
    assert all(vote.get("reason") for vote in votes if vote["status"] == "undecided")
    reasons = Counter(row["reason"].partition(":")[0] for row in candidates)
    assert set(reasons) == {"kept", "different", "undecided"}

    # Votes on one pair are one and the same question to the server.
    again = sum(times - VOTES for times in bad.answered.values())
    assert set(bad.answered) and min(bad.answered.values()) == VOTES and again <= kills * CONCURRENCY, "paid for twice"
    troubled = bad.tried.total() - bad.answered.total()
    assert 0.1 < troubled / bad.tried.total() < 0.3
    (spent,) = bill(tmp_path / "killed", load(recipe))
    assert spent["calls"] == VOTES * len(bad.answered) and spent["tokens"]["in"] == 100 * spent["calls"]
    assert funnel.measure(tmp_path / "killed")["asked"] == [spent]

    # And what comes out is what an undisturbed run makes.
    assert subprocess.run([*command, str(tmp_path / "whole")], stdout=subprocess.DEVNULL).returncode == 0
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
