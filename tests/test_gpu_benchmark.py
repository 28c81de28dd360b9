"""benchmarks/gpu.py: its small run goes through every part; what fails or runs out of time costs no more than that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("golden", "inference", "training", "memory")


def run(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), "--small", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


NEEDS_A_GPU = {"memory": {"8", "16"}}  # nf4 runs on CUDA alone; int8 needs torchao, which tests do without


def read(out: Path, part: str) -> dict[str, Any]:
    return json.loads((out / f"gpu-{part}.json").read_text("utf8"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    done = run(out, "--seconds", "900", "--limits", ",".join(f"{part}=300" for part in PARTS))
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.soak
@pytest.mark.parametrize("part", PARTS)
def test_every_line_of_a_part_is_measured(small: Path, part: str) -> None:
    result = read(small, part)
    assert result["lines"] and set(result["not_run"]) <= NEEDS_A_GPU.get(part, set())
    assert result["complete"] == (not result["not_run"])
    failed = {name: line["failed"] for name, line in result["lines"].items() if "failed" in line}
    # inductor's own trouble is not ours: without a C++ compiler everything is measured uncompiled
    assert not failed.keys() - {"torch.compile"}, failed


@pytest.mark.soak
def test_exact_draws_what_the_released_way_draws(small: Path) -> None:
    lines = read(small, "inference")["lines"]
    for case in ("unguided", "guided"):
        assert 0 < lines[f"{case} exact"]["difference"]["max"] < 1e-4
        assert lines[f"{case} exact"]["forwards"] == lines[f"{case} released"]["forwards"]
    assert lines["guided fastest"]["difference"]["max"] > 0.01


@pytest.mark.soak
def test_a_part_that_runs_out_of_time_is_ended_and_the_next_one_runs(tmp_path: Path) -> None:
    done = run(tmp_path, "--parts", "inference,memory", "--limits", "inference=4.1,memory=300", "--seconds", "600")
    assert done.returncode == 1
    assert "inference stopped at its 4 s" in done.stdout
    assert not read(tmp_path, "inference").get("complete")
    assert set(read(tmp_path, "memory")["not_run"]) <= NEEDS_A_GPU["memory"]


def test_a_line_that_was_not_run_leaves_the_result_incomplete_and_is_named(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; import measuring; "
        "sheet = measuring.Sheet('x', Path(sys.argv[1]), torch.device('cpu'), 5.0); "
        "sheet.line('quick', lambda: {'s': 1}); sheet.line('slow', lambda: {'s': 2}, needs=900); sheet.finish()"
    )
    path = tmp_path / "x.json"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=(ROOT / "benchmarks"))
    found = json.loads(path.read_text())
    assert found["complete"] is False and found["not_run"] == ["slow"]


@pytest.mark.parametrize("path", sorted(((ROOT / "benchmarks") / "results").glob("*.json")), ids=lambda path: path.stem)
def test_no_committed_result_claims_lines_that_were_not_run(path: Path) -> None:
    found = json.loads(path.read_text("utf8"))
    lines = found.get("lines") if isinstance(found, dict) else None
    if lines:
        assert found["complete"] == (not any("not_run" in line for line in lines.values()))
