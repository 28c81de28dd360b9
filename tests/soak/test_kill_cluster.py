"""A cluster of three nodes that loses workers, actors and nodes, twenty in all, makes what one process makes.

make soak        (or: pytest -m soak -s tests/soak/test_kill_cluster.py)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "cluster_kills.py"


@pytest.mark.soak
def test_twenty_kills_in_a_cluster_lose_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    spec: Any = importlib.util.spec_from_file_location("benchmark_cluster_kills", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.run(20, tmp_path / "result.json")
    assert sum(found["kills"].values()) == 20 and len(found["kills"]) == 3
