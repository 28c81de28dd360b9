"""The command line: answers at once, fails in one line, and has the right exit code."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import resource
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.main import get_command

from diptych.cli import app
from diptych.cli.options import QUANTIZERS
from diptych.data.images import read_provenance
from diptych.errors import UsageError
from diptych.student.runtime import speed
from diptych.utils.paths import packaged
from raising import raises

COMMANDS: dict[str, Any] = {}
for _name, _command in get_command(app.app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
    inner = getattr(_command, "commands", None)
    COMMANDS |= {f"{_name} {each}": one for each, one in inner.items()} if inner else {_name: _command}


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = app.call(list(args))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "reference.png"
    Image.new("RGB", (64, 64), (200, 30, 60)).save(path)
    return path


@pytest.fixture
def student(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for `diptych.apps.student.Student` and records the calls."""
    calls: dict[str, Any] = {}

    class Student:
        pipeline = types.SimpleNamespace(runtime=types.SimpleNamespace(memory=None))

        @classmethod
        def load(cls, model: str, **options: Any) -> Student:
            if model == "nope":
                raise UsageError("model_not_found", "unknown student model 'nope'")
            calls.update(model=model, **options)
            return cls()

        def generate(self, reference: Image.Image, prompt: str, **options: Any) -> Image.Image:
            if prompt == "crash":
                raise RuntimeError("first line\nsecond line")
            del options["callback_on_step_end"]
            calls.update(prompt=prompt, reference=reference, **options)
            image = Image.new("RGB", (64, 48))
            image.info = {"seed": options["seed"], "prompt": prompt}
            return image

    monkeypatch.setattr("diptych.apps.student.Student", Student)
    monkeypatch.setattr("diptych.apps.batch.identify", lambda loading: {})
    return calls


def test_help_answers_at_once_and_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from diptych.cli import app; code = app.call(sys.argv[1:]); "
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'pyarrow', 'PIL'} & set(sys.modules); "
        "print('HEAVY', heavy) if heavy else None; sys.exit(code)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)  # an installed package has its bytecode
    seconds = []
    while len(seconds) < 5 and min(seconds, default=1) > 0.5:  # other work on the machine may slow one of them
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", code, "--help"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and "HEAVY" not in done.stdout
        assert "generate" in done.stdout
    assert min(seconds) < 0.5, seconds


def test_without_arguments_it_lists_the_commands_in_the_order_of_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys)
    assert (code, err) == (0, "")
    order = ("doctor", "run", "write", "paint", "curate", "data", "distill", "generate", "serve", "evaluate", "trace")
    places = [out.index(f"\n  {name} ") for name in order]
    assert places == sorted(places)
    assert "...\n" not in out.partition("Start:")[2] and len(out.splitlines()) < 50, "summaries are complete"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_groups_and_an_example_that_fit_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, out, _ = call(capsys, *name.split(), "--help")
        assert code == 0 and "\x1b" not in out and max(map(len, out.splitlines())) <= columns
        sections = re.findall(r"^(\S.*):$", out, re.MULTILINE)
        assert sections[-1] in ("Example", "Examples") and len(sections) == len(set(sections))
        assert f"\n  diptych {name}" in out.partition(f"{sections[-1]}:")[2]
        assert "Other:\n  --help " in out, "every option but --help has a group"
        assert not re.search(r"^  \S+( \S*\|)", out, re.MULTILINE), "metavars are plain"
        assert ("--json" in out) == (name != "serve")


def test_help_of_generate_is_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = call(capsys, "generate", "--help")
    assert len(out.splitlines()) <= 60
    for section in ("Input", "Output", "Model", "Speed and memory", "Sampling"):
        assert f"\n{section}:\n" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_long_example_can_be_copied(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call(capsys, *name.split(), "--help")
    examples = re.split(r"\nExamples?:\n", out)[1].replace("\\\n", "").splitlines()
    expected = [shlex.split(line) for line in (COMMANDS[name].epilog or "").splitlines()]
    assert [shlex.split(line) for line in examples] == expected


def test_switches_are_listed_with_their_cost(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "switches", "--json")
    listed = json.loads(out)
    assert code == 0 and set(listed["switches"]) == set(speed.HELP) and set(listed["presets"]) == set(speed.PRESETS)
    assert "CP·PF" in listed["switches"]["decode"]["cost"]
    code, out, _ = call(capsys, "switches")
    assert code == 0 and all(f"\n  {name}=" in out for name in speed.HELP)


def test_an_empty_value_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["run", "pocket", "--out", ""], ["run", "pocket", "--from", " "], ["serve", "--token-file", ""]):
        code, _, err = call(capsys, *words)
        assert code == 2 and err.startswith("error[option_invalid]: ") and words[-2] in err


def test_generate_has_the_options_of_the_field(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "generate", "--help")
    options = "model base reference prompt out seed steps guidance image-guidance text-guidance size"
    for option in options.split():
        assert f"--{option} " in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from diptych import __version__

    assert call(capsys, "--version") == (0, f"diptych {__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "exit_code", "code", "fact"),
    [
        ("runn x", 2, "usage", "'run'"),
        ("run", 2, "usage", "RECIPE"),
        ("run pocket --bogus", 2, "usage", "--bogus"),
        ("run nope", 2, "path_not_found", "nope"),
        ("run pocket --set distill.stpes=1", 2, "recipe_invalid", "did you mean 'steps'?"),
        ("run pocket --set x", 2, "option_invalid", "--set x"),
        ("paint pocket --set write.count=no", 2, "recipe_invalid", "write.count"),
        ("run pocket --set task=nope", 2, "task_unknown", "'nope'"),
        ("generate --prompt x", 2, "option_missing", "--reference"),
        ("generate --reference {picture}", 2, "option_missing", "--prompt"),
        ("generate --reference {picture} --prompt x --out x.gif", 2, "file_format_unknown", ".png"),
        ("generate --reference {picture} --prompt x --preview x.gif", 2, "file_format_unknown", ".png"),
        ("generate --reference {picture} --prompt x --prompt y", 2, "option_missing", "--out"),
        ("generate --reference {picture} --prompt x --seed 1 --seed 2 --out x.png", 2, "output_collision", "x.png"),
        ("generate --reference {picture} --prompt x --fit croop", 2, "option_invalid", "did you mean 'crop'"),
        ("generate --reference {picture} --prompt x --background blu", 2, "option_invalid", "did you mean 'blue'"),
        ("generate --batch nope.jsonl --out x", 1, "path_not_found", "nope.jsonl"),
        ("generate --batch {picture} --out x", 2, "file_format_unknown", "byte 1"),
        ("generate --reference {picture} --prompt x --size big", 2, "size_invalid", "big"),
        ("generate --reference {picture} --prompt x --size 64x64x64", 2, "size_invalid", "64x64x64"),
        ("generate --reference {picture} --prompt x --size 0", 2, "size_invalid", "0"),
        ("generate --reference {picture} --prompt x --seed -1", 2, "usage", "--seed"),
        ("generate --reference {picture} --prompt x --model nope", 2, "model_not_found", "nope"),
        ("generate --reference nope.png --prompt x", 1, "image_not_found", "nope.png"),
        ("generate --reference {picture}/.. --prompt x", 1, "path_unreadable", "reference.png/.."),
        ("generate --reference {picture} --prompt crash", 1, "internal", "RuntimeError: first line second line"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_two_and_failure_one(
    capsys: pytest.CaptureFixture[str],
    student: dict[str, Any],
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: str,
    exit_code: int,
    code: str,
    fact: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    got, out, err = call(capsys, *args.format(picture=picture).split())
    lines = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert (got, out, len(lines)) == (exit_code, "", 1), err
    assert lines[0].startswith(f"error[{code}]: ") and fact in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["reference.png"], "a rejected command leaves nothing behind"


def test_an_empty_prompt_is_wrong_use(capsys: pytest.CaptureFixture[str], picture: Path) -> None:
    code, _, err = call(capsys, "generate", "--reference", str(picture), "--prompt", " ")
    assert code == 2 and err.startswith("error[text_empty]: ") and "--prompt" in err


def test_generate_passes_on_the_given_options_only(
    capsys: pytest.CaptureFixture[str], student: dict[str, Any], picture: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "a.png"
    args = ["generate", "--reference", str(picture), "--prompt", "a cat", "--out", str(out), "--seed", "7"]
    code, stdout, _ = call(capsys, *args)
    assert (code, stdout) == (0, f"{out}\n")
    assert student.pop("reference").size == (64, 64)
    assert student == {
        **{"model": "pocket", "base": None, "device": None, "parallel": False, "progress_bar": False},
        **{"prompt": "a cat", "seed": 7},
    }
    provenance = read_provenance(out)
    assert provenance is not None and len(provenance.pop("request")) == len(provenance.pop("reference_sha256")) == 64
    assert provenance == {"seed": 7, "prompt": "a cat", "reference_file": "reference.png"}
    more = (
        "--steps 5 --guidance 3 --image-guidance 1.5 --text-guidance 2 --size 64x48 --fit pad --base b --model m "
        "--json --negative-prompt dog --background black --lora x.safetensors --lora y.safetensors:0.5"
    )
    code, stdout, err = call(capsys, *args, *more.split())
    assert code == 0 and err == ""
    assert json.loads(stdout)["out"] == str(out)
    assert (student["steps"], student["image_guidance"], student["size"], student["fit"]) == (5, 1.5, (64, 48), "pad")
    assert (student["guidance"], student["text_guidance"], student["base"]) == (3.0, 2.0, "b")
    assert student["lora"] == [(Path("x.safetensors"), 1.0), (Path("y.safetensors"), 0.5)]
    assert (student["negative_prompt"], student["background"]) == ("dog", "black")


def test_on_a_terminal_the_image_is_shown_and_in_a_pipe_only_on_request(
    capsys: pytest.CaptureFixture[str],
    student: dict[str, Any],
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TMUX", "TERM_PROGRAM", "KITTY_WINDOW_ID", "LC_TERMINAL", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    out = str(tmp_path / "a.png")
    args = ["generate", "--reference", str(picture), "--prompt", "a cat", "--out", out, "--seed"]
    assert call(capsys, *args, "1")[1] == f"{out}\n"
    _, shown, _ = call(capsys, *args, "2", "--show")
    assert shown.endswith(f"\x1b[0m\n{out}\n") and shown.count("▀") == 40 * 15, "4:3, of half blocks"
    assert json.loads(call(capsys, *args, "3", "--show", "--json")[1])["out"] == out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "▀" in call(capsys, *args, "4")[1]
    assert "▀" not in call(capsys, *args, "5", "--no-show")[1]
    monkeypatch.setenv("TERM", "xterm-kitty")
    assert call(capsys, *args, "6")[1].startswith("\x1b_Ga=T,f=100,")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("COLORTERM")
    assert call(capsys, *args, "7")[1] == f"{out}\n"
    for name in "xyzab":
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    monkeypatch.setenv("TERM", "xterm-kitty")
    folder = [*args[:1], "--reference", str(tmp_path), *args[3:5], "--out", str(tmp_path / "many"), "--show"]
    _, shown, _ = call(capsys, *folder)
    sent = Image.open(io.BytesIO(base64.b64decode("".join(re.findall(r"m=[01];([^\x1b]*)\x1b", shown)))))
    assert sent.size == (4 * 64 + 3 * 2, 48), "four images of six or more, side by side"


def test_many_pictures_are_drawn_once_and_failures_are_the_exit_code(
    capsys: pytest.CaptureFixture[str], student: dict[str, Any], picture: Path, tmp_path: Path
) -> None:
    out, broken = tmp_path / "out", tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    args = ["generate", "--prompt", "a cat", "--prompt", "a dog", "--seed", "1", "--seed", "2", "--out", str(out)]
    code, stdout, err = call(capsys, *args, "--reference", str(picture))
    assert (code, "4 generated" in err) == (0, True)
    assert sorted(stdout.split()) == sorted(str(path) for path in out.iterdir())
    code, stdout, err = call(capsys, *args, "--reference", str(picture), "--reference", str(broken))
    assert (code, stdout) == (1, "")
    assert "0 generated, 4 unchanged, 4 failed" in err and "error[rows_failed]: 4 of 8 " in err
    code, stdout, err = call(capsys, *args, "--reference", str(picture), "--reference", str(broken), "--json")
    result = json.loads(stdout)
    assert (code, len(result["skipped"]), len(result["failed"]), result["pictures"]) == (1, 4, 4, [])
    assert [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()] == result["failed"]


def test_python_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "diptych", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("diptych ")


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, student: dict[str, Any], picture: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("DIPTYCH_DEBUG", "1")
    monkeypatch.chdir(tmp_path)
    with raises("image_not_found", "nope.png"):
        app.call(["generate", "--reference", "nope.png", "--prompt", "x"])
    with pytest.raises(RuntimeError):
        app.call(["generate", "--reference", str(picture), "--prompt", "crash"])


def test_our_warnings_are_one_line_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def warn(teacher: str | None) -> dict[str, Any]:
        logging.getLogger("diptych.apps.student").warning("the model does not know: %s", "zebra")
        return {"problems": [], "x": 1}

    monkeypatch.setattr("diptych.cli.doctor.examine", warn)
    code, out, err = call(capsys, "doctor", "--json")
    assert (code, json.loads(out)["x"]) == (0, 1)
    assert err == "warning: the model does not know: zebra\n"


def test_the_documented_examples_and_recipes_are_found_outside_a_clone(
    capsys: pytest.CaptureFixture[str], student: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for reference in ("examples/references/cat.png", "examples/references"):
        words = ["generate", "--reference", reference, "--prompt", "a cat", "--out", f"{Path(reference).stem}/"]
        assert call(capsys, *words)[0] == 0
    assert len(list(tmp_path.glob("references/*.png"))) == len(list(packaged("examples/references").glob("*.png")))
    assert call(capsys, "tasks", "examples/season.yaml")[0] == 0
    assert call(capsys, "plan", "recipes/demo.yaml", "--json")[0] == 0
    code, _, err = call(capsys, "generate", "--reference", "examples/references/dog.png", "--prompt", "a dog")
    assert code == 1 and "examples/references/dog.png" in err


@pytest.mark.parametrize("quantized", [False, True])
def test_quantizers_are_imported_only_for_a_model_that_needs_them(
    quantized: bool, picture: Path, tmp_path: Path
) -> None:
    for name in QUANTIZERS:
        (tmp_path / f"{name}.py").write_text(f"open('{name}.imported', 'w')\n__version__ = '9.9.9'\n")
        info = tmp_path / f"{name}-9.9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9.9\n")
    base = tmp_path / "base" / "text_encoder"
    base.mkdir(parents=True)
    (base / "config.json").write_text('{"quantization_config": {}}' if quantized else "{}")
    words = [
        "generate",
        "--reference",
        str(picture),
        "--prompt",
        "a cat",
        "--model",
        "pocket",
        "--base",
        "base",
        "--out",
        "x.png",
    ]
    code = f"from diptych.cli.app import call; call({words}); import diffusers.utils.torch_utils, peft.helpers"
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    imported = {name for name in QUANTIZERS if (tmp_path / f"{name}.imported").exists()}
    assert bool(imported) == quantized, done.stderr


def test_the_warnings_of_quantizers_are_for_debugging(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    loggers = [logging.getLogger(name) for name in ("torchao.kernel", "bitsandbytes.cextension", "torch.utils._pytree")]

    def warn(teacher: str | None) -> dict[str, Any]:
        for logger in loggers:
            logger.warning("Failed to load %s", logger.name)
        return {"problems": []}

    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    monkeypatch.setattr("diptych.cli.doctor.examine", warn)
    monkeypatch.setenv("DIPTYCH_DEBUG", "1")
    app.call(["doctor", "--json"])
    assert len(caplog.records) == len(loggers)
    monkeypatch.delenv("DIPTYCH_DEBUG")
    app.call(["doctor", "--json"])
    assert len(caplog.records) == len(loggers)


def test_a_closed_pipe_shows_no_traceback() -> None:
    command = f"{sys.executable} -m diptych.cli.app --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
