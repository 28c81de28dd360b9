"""`diptych init` writes recipes that can be planned and that fit their budget; the shell completes names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diptych import recipe
from diptych.cli import app
from diptych.run import plan as plans
from diptych.run.plan.assumptions import devices
from terminal import CODES, on_terminal


def written(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[recipe.Recipe, dict[str, Any], str]:
    """The recipe of `diptych init` with these arguments, its result, and the text of the file."""
    code = app.call(["init", "mine.yaml", "--json", *args])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return recipe.load("mine.yaml"), json.loads(captured.out), Path("mine.yaml").read_text()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("teacher", "task", "gpu", "budget", "hours"),
    [
        ("pocket", "subject", "cpu", "10min", 1 / 6),
        ("pocket", "relight", "cpu", "2h", 2),
        ("pocket", "character", "cpu", "30min", 0.5),
        ("flux.1-dev", "subject", "8xH100", "3d", 72),
        ("FLUX.1-dev", "relight", "RTX4090", "7d", 168),
        ("black-forest-labs/FLUX.1-dev", "scene", "H200", "100", 100),
    ],
)
def test_a_recipe_can_be_planned_and_uses_its_budget(
    capsys: pytest.CaptureFixture[str], teacher: str, task: str, gpu: str, budget: str, hours: float
) -> None:
    made, result, text = written(capsys, "--teacher", teacher, "--task", task, "--gpu", gpu, "--budget", budget)
    assert made.name == "mine" and made.task == task and made.teacher.lower().endswith(teacher.lower())
    number, _, name = gpu.rpartition("x")
    words = ["plan", "mine.yaml", "--gpu", name, "--assume", f"devices={number or 1}", "--json"]
    assert app.call(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["totals"] == result["plan"]["totals"]
    assert 0.7 * hours < plan["totals"]["wall_hours"] <= 0.86 * hours
    memory = devices()[name].memory
    assert memory is None or plan["stages"]["distill"]["memory"] <= memory
    assert plan["counts"]["kept"] >= made.distill.batch_size
    assert made.distill.validate_every <= made.distill.steps >= made.distill.checkpoint_every
    comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert len(comments) > 8, "there is a comment above what one may change"
    assert max(map(len, text.splitlines())) <= 120


def test_more_time_is_more_pairs_and_more_steps(capsys: pytest.CaptureFixture[str]) -> None:
    short, _, _ = written(capsys, "--budget", "10min")
    long, _, _ = written(capsys, "--budget", "1h", "--force")
    assert long.write.count > 3 * short.write.count and long.distill.steps > 3 * short.distill.steps


def test_a_file_is_replaced_only_with_force(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("precious")
    for words in (["mine.yaml"], ["mine.yaml", "--json"]):
        assert app.call(["init", *words]) == 2
        assert "output_exists" in capsys.readouterr().err and Path("mine.yaml").read_text() == "precious"
    written(capsys, "--force")
    Path("my-relight.yaml").symlink_to("mine.yaml")
    before = Path("mine.yaml").read_text()
    assert app.call(["init", "--task", "relight"]) == 2, "the default name exists, too"
    assert Path("mine.yaml").read_text() == before


@pytest.mark.parametrize(
    ("words", "code", "fact"),
    [
        ("--budget soon", "option_invalid", "--budget soon"),
        ("--budget 0h", "option_invalid", "--budget 0h"),
        ("--budget 1min --teacher flux.1-dev", "option_unsuited", "--budget"),
        ("--gpu H1000", "hardware_unknown", "did you mean 'H100'"),
        ("--gpu 0xH100", "hardware_unknown", "0xH100"),
        ("--teacher FLUX.1-schnell", "teacher_distilled", "schnell"),
        ("--teacher nobody/nothing", "model_not_found", "nobody/nothing"),
        ("--task sujbect", "task_unknown", "did you mean 'subject'"),
        ("--task scene", "vocabulary_invalid", "scene"),
    ],
)
def test_a_wrong_answer_is_an_error_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str, code: str, fact: str
) -> None:
    assert app.call(["init", *words.split()]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith(f"error[{code}]: ") and fact in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo terminal")
def test_on_a_terminal_it_asks_four_questions_and_asks_again_after_a_wrong_answer(tmp_path: Path) -> None:
    answers = iter(["nope", "", "scene", "relight", "", "20min"])
    command = [sys.executable, "-m", "diptych", "init"]

    def answer(new: str) -> str | None:
        return f"{next(answers)}\n" if re.search(r"\]: ?$", new) else None

    code, text = on_terminal(command, answer, 120, tmp_path)
    lines = CODES.sub("", text).splitlines()
    assert code == 0, text
    asked = re.findall(r"(\d/4) ", CODES.sub("", text))  # an answer's echo may come late, so not by lines
    assert asked == ["1/4", "1/4", "2/4", "2/4", "3/4", "4/4"]
    assert any("'nope'" in line and "Traceback" not in text for line in lines)
    made = recipe.load(tmp_path / "my-relight.yaml")
    assert (made.name, made.task, made.teacher) == ("my-relight", "relight", "pocket")
    assert plans.make(made)["totals"]["wall_hours"] <= 1 / 3
    assert lines[-1].startswith("next: diptych plan my-relight.yaml") and "diptych run my-relight.yaml" in lines[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("run po", ["pocket", "pocket-both", "pocket-relight"]),
        ("tasks rel", ["relight"]),
        ("init --task s", ["scene", "subject"]),
        ("generate --model ", ["pocket", "runs/done"]),
        ("data stats ", ["runs/begun", "runs/done"]),
        ("data export runs/done --format u", ["uno"]),
        ("gen", ["generate"]),
    ],
)
def test_the_shell_completes_names(tmp_path: Path, words: str, expected: list[str]) -> None:
    for name in ("begun", "done"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.yaml").touch()
    (tmp_path / "runs" / "done" / "student").mkdir()
    environment = os.environ | {"_DIPTYCH_COMPLETE": "complete_bash", "COMP_WORDS": f"diptych {words}"}
    environment["COMP_CWORD"] = str(len(f"{words}|".split()))
    command = [sys.executable, "-m", "diptych"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected
