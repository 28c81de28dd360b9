"""A plan from the config is within 10 % of what loading a model of 2.1 GB takes, for every preset that runs here.

make soak        (or: pytest -m soak -s tests/soak/test_memory_plan.py)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.soak
def test_plan_is_within_a_tenth_of_a_real_load(tmp_path: Path) -> None:
    spec: Any = importlib.util.spec_from_file_location("benchmark_memory", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    result = benchmark.load("cpu", tmp_path / "result.json")
    measured = {key: found for key, found in result["presets"].items() if "planned_over_loaded" in found}
    assert len(measured) >= 4 and result["presets"]["48"]["loaded_bytes"] > 2e9
    for key, found in measured.items():
        assert found["planned_over_loaded"] == pytest.approx(1, abs=0.1), (key, found)
