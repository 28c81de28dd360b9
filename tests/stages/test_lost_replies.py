"""A run whose language model is down for a while, or answers nothing of use: no verdict comes of it, no answer is
replayed, and the bill is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import plain_stages
import vlm_run
from coloured import opinion
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.recipe import load
from diptych.run.runner import run
from diptych.stages.curate import captioning
from diptych.stages.write import stage  # before `plain_stages` takes the package's place
from diptych.utils.console import Display
from llm.chat_server import Act, Call, Serve, refuse, say
from raising import raises

GRIDS = 12
ROWS = ("write", "paint", "curate")


class Said(Display):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def recipe(folder: Path, url: str, **sections: Any) -> Path:
    for name in ("teacher", "judge"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps({"name": name}))
    endpoint = {"base_url": url, "model": "tiny", "backoff": 0.005, "retries": 1, "concurrency": 1, "timeout": 20.0}
    vlm = {"endpoint": endpoint, **sections.pop("vlm", {})}
    curate = {"judge": f"{folder}/judge", "batch_size": 5, "thresholds": {"seam": -1}, "vlm": vlm}
    values = {"name": "lost", "teacher": f"{folder}/teacher", "device": "cpu", "threads": 1, "curate": curate}
    values |= {"write": {"count": GRIDS, "shard_size": 4}, "paint": {"dtype": "float32"}}
    path = folder / "lost.yaml"
    path.write_text(json.dumps({**values, "distill": {"precision": "float32"}, **sections}))
    return path


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_stages.use(monkeypatch, PaintStage=vlm_run.PaintStage, CurateStage=vlm_run.CurateStage)


def rows(run_dir: Path) -> dict[str, list[str]]:
    """The ids in each folder of rows, and the reasons of failures."""
    found = {name: [row["id"] for row in Dataset(run_dir / name).columns("id")] for name in ("candidates", "pairs")}
    failed = run_dir / "failed" / "curate"
    return found | {"failed": [row["reason"] for row in Dataset(failed)] if failed.is_dir() else []}


@pytest.mark.parametrize(
    ("trouble", "captions"),
    [(refuse(503, "gone"), False), (say(None), False), (Act(hang_up=True), True)],
    ids=["refuses", "empty", "hangs up at captions"],
)
def test_what_got_no_reply_is_no_verdict_and_is_asked_again_by_the_next_run(
    serve: Serve, tmp_path: Path, stages: None, trouble: Act, captions: bool
) -> None:
    down: list[bool] = [True]

    def act(call: Call) -> Act:
        wants_words = "instruction:" in call.text(1)
        asks_again = call.body["messages"][1] in lost
        if down and wants_words == captions and (asks_again or len(lost) < 3):
            lost.append(call.body["messages"][1])
            return trouble
        return say({"description": "a cat", "instruction": "make it night"}) if wants_words else say(opinion(True))

    lost: list[Any] = []
    server = serve(act)
    path = recipe(tmp_path, server.url, vlm={"captions": captions})
    assert captioning.BRIEF
    said = Said()
    first = run(load(path), tmp_path / "a", stages=ROWS, display=said)
    found = rows(tmp_path / "a")
    assert 1 <= len(found["failed"]) <= 3 and all(reason.startswith("no reply: ") for reason in found["failed"])
    assert len(found["candidates"]) == 2 * (GRIDS - len(found["failed"])) and first["stages"]["curate"]["lost"]
    assert any("run the same command again" in line for line in said.lines)
    assert any("calls" in line for line in said.lines)

    down.clear()
    before = len(server.calls)
    run(load(path), tmp_path / "a", stages=ROWS, display=Display(quiet=True))
    whole = rows(tmp_path / "a")
    assert whole["failed"] == [] and len(whole["candidates"]) == 2 * GRIDS
    assert len(server.calls) - before == len(found["failed"]) * (2 if captions else 1)
    run(load(path), tmp_path / "b", stages=ROWS, display=Display(quiet=True))
    assert whole == rows(tmp_path / "b")
    for name in ("candidates", "pairs"):
        parts = sorted((tmp_path / "a" / name).glob("part-*"))
        assert [p.read_bytes() for p in parts] == [(tmp_path / "b" / name / p.name).read_bytes() for p in parts]
    calls = len(server.calls)
    run(load(path), tmp_path / "a", stages=ROWS, display=Display(quiet=True))
    assert len(server.calls) == calls


def test_once_a_student_is_trained_its_pairs_stay(serve: Serve, tmp_path: Path, stages: None) -> None:
    server = serve(lambda call: refuse(503, "gone") if call.number < 2 else say(opinion(True)))
    path = recipe(tmp_path, server.url)
    run(load(path), tmp_path / "a", display=Display(quiet=True))
    student, calls = (tmp_path / "a" / "student" / "student.json").read_bytes(), len(server.calls)
    run(load(path), tmp_path / "a", display=Display(quiet=True))
    assert len(server.calls) == calls and len(rows(tmp_path / "a")["failed"]) == 1
    assert (tmp_path / "a" / "student" / "student.json").read_bytes() == student


@pytest.mark.parametrize(
    ("reply", "code", "wanted"),
    [
        (say("I see no images."), "reply_invalid", {"kept", "undecided: no valid answer"}),
        (say(None), "endpoint_unreachable", {"kept"}),
    ],
    ids=["useless", "empty"],
)
def test_a_judge_that_says_nothing_of_use_stops_the_stage_with_its_bill(
    serve: Serve, tmp_path: Path, stages: None, reply: Act, code: str, wanted: set[str]
) -> None:
    mended: list[bool] = []
    server = serve(lambda call: say(opinion(True)) if mended else reply)
    path = recipe(tmp_path, server.url)
    values = json.loads(path.read_text())
    values["curate"]["vlm"]["endpoint"]["stop_after"] = 8
    path.write_text(json.dumps(values))
    said = Said()
    with raises(code, "8 questions"):
        run(load(path), tmp_path / "a", stages=ROWS, display=said)
    (bill,) = [line for line in said.lines if "calls" in line]
    assert "16 calls" in bill
    mended.append(True)
    run(load(path), tmp_path / "a", stages=ROWS, display=Display(quiet=True))
    found = rows(tmp_path / "a")
    assert len(found["candidates"]) == 2 * GRIDS
    reasons = {row["reason"] for row in Dataset(tmp_path / "a" / "candidates").columns("reason")}
    assert reasons == wanted


def written(folder: Path, url: str, count: int) -> Callable[[Said], dict[str, Any]]:
    """A run of the real writer alone."""
    endpoint = {"base_url": url, "model": "tiny", "backoff": 0.005, "retries": 0, "concurrency": 1, "stop_after": 20}
    section = {"writer": "llm", "endpoint": endpoint, "count": count, "shard_size": 24}
    path = recipe(folder, url, write=section, curate={"judge": f"{folder}/judge"})
    assert stage.WRITERS
    return lambda said: run(load(path), folder / "a", stages=("write",), display=said)


@pytest.mark.parametrize(
    ("count", "calls", "says"),
    [(24, 40, "Sure! Here is your prompt."), (6, 12, "holds no JSON object")],
)
def test_a_writer_that_only_gets_useless_answers_stops_shows_its_bill_and_replays_none_of_them(
    serve: Serve, tmp_path: Path, count: int, calls: int, says: str
) -> None:
    mended: list[bool] = []

    def act(call: Call) -> Act:
        if not mended:
            return say("Sure! Here is your prompt.")
        n = call.number
        looks = [f"w{n}x{i}" for i in range(12)]
        panels = [f"p{n} on q{n}", f"r{n} under s{n}"]
        return say({"subject": f"k{n}", "description": " ".join(looks), "style": "a drawing", "panels": panels})

    server = serve(act)
    start = written(tmp_path, server.url, count)
    said = Said()
    with pytest.raises(UserError) as caught:
        start(said)
    assert ("20 questions in a row" in str(caught.value)) == (count == 24)
    assert says in str(caught.value)
    (bill,) = [line for line in said.lines if "calls" in line]
    assert f"{calls} calls" in bill
    mended.append(True)
    if count < 20:
        for part in (tmp_path / "a" / "prompts").iterdir():
            part.unlink()
    start(Said())
    assert len(Dataset(tmp_path / "a" / "prompts")) == count
