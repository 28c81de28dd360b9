"""`diptych run` on the shipped pocket weights, killed twenty times at random moments, ends with the same bytes.

make soak        (or: pytest -m soak -s tests/soak/test_kill_run.py)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kills.py"


@pytest.mark.soak
def test_twenty_kills_of_a_run_lose_nothing(tmp_path: Path) -> None:
    spec: Any = importlib.util.spec_from_file_location("benchmark_kills", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.run(20, tmp_path / "result.json")
    assert sum(found["kills"].values()) == 20 and sum(1 for count in found["kills"].values() if count) >= 3
