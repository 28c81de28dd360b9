"""The server under fifty clients, killed in the middle, under thousands of malformed requests, and under floods.

make soak        (or: pytest -m soak -s tests/soak/test_serve.py)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(name: str) -> Any:
    spec: Any = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.soak
def test_fifty_clients_get_all_their_pictures_also_from_a_server_that_is_killed(tmp_path: Path) -> None:
    found = benchmark("serve_load").run(50, 500, 2, tmp_path / "result.json")
    for load in (found["alone"], found["killed"]):
        assert load["pictures"] == 500 and load["reported_failed"] == {} and load["answers"]["429"] > 0
    assert found["killed"]["kills"] == 2 and found["killed"]["answers"]["broken"] > 0
    assert found["alone"]["grown_mib"] < 32


@pytest.mark.soak
def test_malformed_requests_break_nothing_and_nobody_gets_in_without_a_token(tmp_path: Path) -> None:
    found = benchmark("serve_fuzz").run(5000, 0, tmp_path / "result.json")
    assert found["grown_mib_by_half"][1] < 96
    assert found["requests"] >= 5000 and found["problems"] == [] and found["served_without_token"] == 0


@pytest.mark.soak
def test_honest_clients_are_answered_in_time_beside_every_flood(tmp_path: Path) -> None:
    found = benchmark("serve_floods").run(10, tmp_path / "result.json")
    assert found["problems"] == [] and all(flood["jobs"] >= 8 for flood in found["floods"].values())
