"""The progress of a run: what a terminal, a log and an interrupted user see, and the cost so far."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import plain_stages as stages
from diptych.data import places
from diptych.data.places import answers
from diptych.llm.cache import Cache
from diptych.llm.question import Reply, Usage
from diptych.recipe import check
from diptych.run.spending import Spending
from diptych.utils import console
from diptych.utils.console import Display
from terminal import CODES, on_terminal


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    for name in ("teacher", "judge"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
    path = tmp_path / "small.yaml"
    path.write_text(
        f"{{name: small, teacher: {tmp_path}/teacher, device: cpu, threads: 1, write: {{count: 23, shard_size: 5}}, "
        f"curate: {{judge: {tmp_path}/judge, thresholds: {{same: 0.3}}}}}}"
    )
    return path


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo terminal")
def test_on_a_narrow_terminal_the_progress_stays_in_one_line_and_ctrl_c_ends_with_the_command_that_resumes(
    recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a run"
    command = [sys.executable, stages.__file__, str(recipe_file), str(out), "0.5", "--hour-price", "3600"]
    costs = re.compile(r"2/5 paint.* \d+\.\d\d spent")
    once = iter(["\x03"])
    code, text = on_terminal(command, lambda new: next(once, None) if costs.search(new) else None)
    lines = [CODES.sub("", line).rstrip() for line in re.split(r"[\r\n]+", text)]
    lines = [line for line in lines if line]
    assert code == 130 and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"
    progress = [line for line in lines if re.search(r"\d/5 (write|paint)", line)]
    assert progress and max(map(len, progress)) <= 80
    last = text[text.rindex("error[") :].splitlines()
    assert len(last) == 1 and "Traceback" not in text
    resume = shlex.split(last[0][last[0].index("diptych run ") :])
    assert resume == ["diptych", "run", str(recipe_file), "--out", str(out), "--hour-price", "3600"]
    assert [event["stage"] for event in places.read(out) if event["event"] == "stopped"] == ["paint"]
    again = subprocess.run(
        [sys.executable, stages.__file__, str(recipe_file), str(out), "0"], capture_output=True, text=True, timeout=60
    )
    assert again.returncode == 0, again.stderr
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", again.stderr), "a log has no control characters"
    assert re.search(r"^2/5 paint +\d+/23 grids", again.stderr, re.MULTILINE)
    final = again.stderr.splitlines()[-1]
    assert final.startswith("next: diptych generate --model ") and str(out) in shlex.split(final)


def test_a_log_gets_a_line_at_an_interval_that_grows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    display = Display()
    display.step, display.cost = "1/2", lambda: f"{now[0] - 1000:.2f} spent"
    with display.stage("paint", "grids") as report:
        for done in range(3601):  # one a second, for an hour
            report(done, 3600, "row\n\x1b[2J")
            now[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 60 + 50 + 1  # every 10 s for 10 minutes, then every minute, and the end
    assert lines[0].startswith("1/2 paint 0/3600 grids · 0.00 spent · row")
    assert "650/3600 grids · 1.0 grids/s · 49:10 left · 650.00 spent" in lines[60]
    assert lines[-1].startswith("1/2 paint 3600/3600 grids · 1.0 grids/s · 3600.00 spent")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", "".join(lines))


def test_a_dumb_terminal_is_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert Display().terminal and not Display(quiet=True).terminal
    monkeypatch.setenv("TERM", "dumb")
    assert not Display().terminal


def test_the_cost_has_the_hours_of_all_starts_and_the_language_models(tmp_path: Path) -> None:
    plain = check({"name": "a", "teacher": "pocket"}, "a")
    assert Spending(tmp_path, plain).text() == ""
    places.append(tmp_path, "stage", stage="write", seconds=1800.0, result={})
    places.append(tmp_path, "stopped", stage="paint", seconds=5400.0)
    places.append(tmp_path, "drawn", seconds=900.0)  # is part of its stage
    assert Spending(tmp_path, plain, hour_price=2.5).text() == "5.00 spent"
    endpoint = {"base_url": "http://x/v1", "model": "tiny", "input_price": 2.0, "output_price": 10.0}
    base = {"name": "a", "teacher": "pocket"}
    costly = check({**base, "write": {"writer": "llm", "endpoint": endpoint}}, "a")
    unpriced = check(
        {**base, "write": {"writer": "llm", "endpoint": endpoint | {"input_price": None, "output_price": None}}}, "a"
    )
    with Cache(answers(tmp_path, everywhere=False)) as cache:
        cache.put("key", Reply("text", "tiny", Usage(1, 1_000_000, 100_000)))
    assert Spending(tmp_path, costly).text() == "3.00 spent"
    assert Spending(tmp_path, costly, hour_price=2.5).text() == "8.00 spent"
    assert Spending(tmp_path, unpriced, hour_price=2.5).text() == "1 calls", "money would be too little"
