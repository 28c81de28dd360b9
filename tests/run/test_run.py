"""A run is one recipe in one folder: frozen, locked, and the same rows however often it is killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import plain_stages as stages
from diptych.data import places
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.recipe import load
from diptych.recipe.schema import Recipe
from diptych.run.runner import PromptShards, run
from diptych.utils import machine
from diptych.utils.console import Display, Meter, duration, rate_text
from raising import raises

QUIET = Display(quiet=True)
SCRIPT = Path(stages.__file__)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A small recipe whose models are folders with a few bytes."""
    for name in ("teacher", "judge"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
    text = f"""
name: small
teacher: {tmp_path}/teacher
device: cpu
threads: 1
write: {{count: 23, shard_size: 5}}
curate: {{judge: {tmp_path}/judge, thresholds: {{same: 0.3}}}}
"""
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def recipe(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    stages.use(monkeypatch)
    return load(recipe_file)


def test_a_run_makes_every_part_of_its_folder(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = run(recipe, out, display=QUIET)
    assert [len(Dataset(out / name)) for name in ("prompts", "grids", "candidates")] == [23, 20, 40]
    assert summary["stages"]["paint"]["failed"] == 3 and len(Dataset(out / "failed/paint")) == 3
    pairs = list(Dataset(out / "pairs"))
    expected = [row["id"] for row in Dataset(out / "candidates") if row["similarity"] >= 0.3]
    assert [row["id"] for row in pairs] == expected and 0 < len(pairs) < 40
    assert summary["stages"]["curate"]["pairs"] == len(pairs)
    assert summary["report"] == str(out / "report/report.html")
    manifest = Dataset(out / "grids").manifest
    assert manifest is not None and manifest["inputs"]["prompts"] == Dataset(out / "prompts").manifest_hash()
    assert len(manifest["teacher_sha256"]) == 64 and places.read(out)[0]["versions"]["diptych"]
    json.dumps(summary)
    assert set(places.seconds(out)) == {"write", "paint", "curate", "distill", "evaluate"}


def test_the_same_recipe_twice_gives_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, tmp_path / "a", display=QUIET)
    time.sleep(1.01)  # a clock that got into a file would show
    run(recipe, tmp_path / "b", display=QUIET)
    assert stages.data(tmp_path / "a") == stages.data(tmp_path / "b")


def test_other_versions_of_libraries_alone_change_no_file(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, installed in (("a", "1.0"), ("b", "2.0")):
        monkeypatch.setattr(machine, "version", lambda package, installed=installed: installed)
        run(recipe, tmp_path / name, display=QUIET)
        found.append(places.read(tmp_path / name)[0]["versions"]["pyarrow"])
    assert found == ["1.0", "2.0"] and stages.data(tmp_path / "a") == stages.data(tmp_path / "b")


def test_a_finished_run_does_no_row_again(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, tmp_path / "a", display=QUIET)
    before = stages.data(tmp_path / "a")
    stages.CALLS.clear()
    run(recipe, tmp_path / "a", display=QUIET)
    assert not [call for call in stages.CALLS if call.startswith("load")]
    assert stages.data(tmp_path / "a") == before


def test_stages_run_alone_and_in_order(recipe: Recipe, tmp_path: Path) -> None:
    with raises("run_incomplete", "prompts", "diptych write", "recipe.yaml --out"):
        run(recipe, tmp_path / "a", stages=("paint",), display=QUIET)
    for stage in ("write", "paint", "curate", "distill", "evaluate"):
        run(recipe, tmp_path / "a", stages=(stage,), display=QUIET)
    run(recipe, tmp_path / "b", display=QUIET)
    assert stages.data(tmp_path / "a") == stages.data(tmp_path / "b")


def test_another_recipe_is_refused_and_the_keys_are_named(recipe: Recipe, recipe_file: Path, tmp_path: Path) -> None:
    run(recipe, tmp_path / "a", display=QUIET)
    before = stages.data(tmp_path / "a")
    other = load(recipe_file, ["distill.steps=7", "seed=1"])
    with raises("recipe_mismatch", "seed (0 there, 1 here)", "distill.steps (4000 there, 7 here)", kind=UsageError):
        run(other, tmp_path / "a", display=QUIET)
    assert stages.data(tmp_path / "a") == before


def test_what_the_machine_decided_stays_decided(recipe_file: Path, recipe: Recipe, tmp_path: Path) -> None:
    sets = ["device=auto", "threads=null"]
    run(load(recipe_file, sets), tmp_path / "a", stages=("write",), display=QUIET)
    frozen = load(tmp_path / "a" / "recipe.yaml")
    assert frozen.device != "auto" and frozen.threads is not None
    run(load(recipe_file, sets), tmp_path / "a", stages=("write",), display=QUIET)
    with raises("recipe_mismatch", "threads", kind=UsageError):
        run(load(recipe_file, ["device=auto", "threads=77"]), tmp_path / "a", display=QUIET)


def test_other_weights_under_the_same_name_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, tmp_path / "a", stages=("write", "paint"), display=QUIET)
    (Path(recipe.teacher) / "config.json").write_text('{"name": "another"}')
    with pytest.raises(UserError, match=r"grids/part-00000\.parquet"):
        run(recipe, tmp_path / "a", display=QUIET)


def test_keeping_no_pair_stops_the_run_with_the_reasons(recipe_file: Path, recipe: Recipe, tmp_path: Path) -> None:
    with raises("run_empty", "none of 40 candidate pairs", "different: 40"):
        run(load(recipe_file, ["curate.thresholds.same=2"]), tmp_path / "a", display=QUIET)


def test_the_suite_can_be_left_out(recipe_file: Path, recipe: Recipe, tmp_path: Path) -> None:
    summary = run(load(recipe_file, ["evaluate.suite=none"]), tmp_path / "a", display=QUIET)
    assert "evaluate" not in stages.CALLS and "report" in summary and "metrics" not in summary


def test_a_prompt_depends_on_the_seed_and_its_number_only() -> None:
    one, other = PromptShards(0, 10, 3), PromptShards(0, 20, 7)
    assert [len(shard) for shard in one] == [3, 3, 3, 1]
    assert list(chain(*one)) == list(chain(*other))[:10]
    with pytest.raises(IndexError):
        one[4]
    assert PromptShards(1, 1, 1)[0][0]["seed"] != one[0][0]["seed"]


# ---- processes


def start(recipe_file: Path, out: Path, delay: float, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(recipe_file), str(out), str(delay), *more]
    # A shell's background jobs ignore Ctrl-C and hand that down; this process must hear it wherever the tests are run.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def until(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(recipe_file: Path, tmp_path: Path) -> None:
    code, *_ = finish(start(recipe_file, tmp_path / "whole", 0))
    assert code == 0
    out, chance, kills = tmp_path / "killed", random.Random(3), 0
    # Each kill waits for something new in the folder, so that it hits another place than the last.
    for moment in ("recipe.yaml", "prompts/part-00002.parquet", "grids/part-00001.parquet", "pairs/manifest.json"):
        process = start(recipe_file, out, 0.03)
        until(lambda moment=moment, process=process: (out / moment).exists() or process.poll() is not None)
        time.sleep(chance.random() * 0.1)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        finish(process)
    assert kills >= 3
    code, stdout, stderr = finish(start(recipe_file, out, 0, "--json"))
    assert code == 0, stderr
    assert json.loads(stdout)["stages"]["paint"]["processed"] < 23
    assert stages.data(out) == stages.data(tmp_path / "whole")


def test_ctrl_c_says_how_to_go_on_and_leaves_a_resumable_run(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(recipe_file, out, 0.2)
    until(lambda: (out / "prompts/part-00000.parquet").exists())
    process.send_signal(signal.SIGINT)
    code, _, stderr = finish(process)
    assert code == 130
    assert stderr.splitlines()[-1].startswith("error[interrupted]: ")
    assert "Traceback" not in stderr
    assert finish(start(recipe_file, out, 0))[0] == 0


def test_a_second_process_is_kept_out_while_the_first_lives(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(recipe_file, out, 1.0)
    until(lambda: (out / "recipe.yaml").exists())
    code, _, stderr = finish(start(recipe_file, out, 0))
    assert code == 1 and f"process {first.pid}" in stderr
    first.send_signal(signal.SIGKILL)
    finish(first)
    assert finish(start(recipe_file, out, 0))[0] == 0


def test_without_a_terminal_progress_is_plain_lines_on_stderr(recipe_file: Path, tmp_path: Path) -> None:
    code, stdout, stderr = finish(start(recipe_file, tmp_path / "run", 0))
    assert code == 0 and stdout.splitlines()[-1].endswith("report/report.html")
    assert "\x1b" not in stderr and "\r" not in stderr
    assert re.search(r"^2/5 paint +23/23 grids", stderr, re.MULTILINE)
    assert "paint: 3 of 23 rows failed (first: out of paint)" in stderr


def test_a_folder_that_cannot_be_made_is_one_line(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, stderr = finish(start(recipe_file, tmp_path / "file" / "run", 0))
    assert code == 1 and len(stderr.splitlines()) == 1 and str(tmp_path / "file" / "run") in stderr


# ---- small parts


def test_threads_are_set_whether_or_not_torch_is_loaded_yet() -> None:
    code = "from diptych.run.resolve import use_threads; use_threads(3); import torch; print(torch.get_num_threads()); "
    code += "use_threads(2); print(torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "2"]


def test_a_log_survives_a_line_cut_by_a_kill(tmp_path: Path) -> None:
    places.append(tmp_path, "stage", stage="paint", seconds=1.5)
    with (tmp_path / places.LOG).open("a") as stream:
        stream.write('{"event": "sta')
    places.append(tmp_path, "stage", stage="paint", seconds=2)
    assert places.seconds(tmp_path) == {"paint": 3.5}
    assert places.read(tmp_path / "nothing") == []


def test_rate_and_time_left_leave_out_what_was_there_before() -> None:
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    assert meter.update(100, 200) == (0.0, None)
    now[0] = 10.0
    assert meter.update(120, 200) == (2.0, 40.0)
    assert (duration(7), duration(750), duration(11045)) == ("0:07", "12:30", "3:04:05")
    assert (rate_text(3.14, "grids"), rate_text(0.4, "grids"), rate_text(0, "x")) == ("3.1 grids/s", "2.5 s/grid", "")


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo terminal")
def test_on_a_terminal_a_bar_is_drawn(recipe_file: Path, tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, str(SCRIPT), str(recipe_file), str(tmp_path / "run"), "0.02"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=follower)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:
        pass  # the end of a pseudo terminal
    os.close(leader)
    assert process.wait(60) == 0
    text = shown.decode()
    assert "23/23 grids" in text and "grids/s" in text and "✓" in text
