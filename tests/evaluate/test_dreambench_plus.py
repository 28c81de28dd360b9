"""DreamBench++ from a folder in its published layout to the metrics, judged over the wire by an honest toy judge."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import toy_images as toy

from diptych.cli import app
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.evaluate import harness
from diptych.evaluate.evaluation import Evaluation, Judge
from diptych.evaluate.methods import METHODS
from diptych.evaluate.report import suite_report
from diptych.llm.endpoint import Endpoint
from llm.chat_server import Act, Call, ChatServer, Serve, refuse, say

REFERENCES, PROMPTS = 6, 9
VARYING = ("seconds_per_image", "peak_memory_bytes", "drawing_cost")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_folder(tmp_path_factory.mktemp("dreambench++"))


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more methods, added as anybody would add one."""
    monkeypatch.setitem(METHODS, "good", toy.Good)
    monkeypatch.setitem(METHODS, "ignores", toy.Ignores)


def job(folder: Path, server: ChatServer, *names: str, **more: Any) -> Evaluation:
    settings: dict[str, Any] = {"retries": 0, "backoff": 0.01, "concurrency": 2, "stop_after": 1, "temperature": 1.0}
    endpoint = Endpoint(base_url=server.url, model="toy-judge", input_price=2.0, output_price=10.0, **settings)
    values: dict[str, Any] = {"judge": Judge(endpoint=endpoint), "metrics": [], "size": toy.SIDE, "device": "cpu"}
    values |= {"suite": "dreambench++", "data": str(folder), "baselines": list(names), "batch_size": 9, "bootstrap": 50}
    return Evaluation(**(values | more))


def steady(found: dict[str, Any]) -> dict[str, Any]:
    """Metrics without what differs between two runs on one machine."""
    for scores in found["methods"].values():
        for key in VARYING:
            scores.pop(key, None)
    return found


@pytest.fixture
def small() -> dict[str, Any]:
    return {"references": 3, "prompts": 2}


def test_copying_and_ignoring_score_nothing_and_the_published_aggregation_is_ours(
    folder: Path, serve: Serve, tmp_path: Path
) -> None:
    server = serve(toy.honest)
    found = harness.evaluate(job(folder, server, "good", "copy", "ignores", references=3, prompts=3), tmp_path / "out")
    good, copy, ignores = (found["methods"][name] for name in ("good", "copy", "ignores"))
    assert (good["cp"], good["pf"], good["cp_pf"], good["cp_pf_debiased"]) == (1, 1, 1, 1)
    assert (copy["cp"], copy["pf"], copy["cp_pf"]) == (1, 0, 0)
    assert copy["copy_rate"] == 1 and copy["cp_debiased"] == 0.25 and good["copy_rate"] == 0
    assert (ignores["cp"], ignores["pf"], ignores["cp_pf"]) == (0, 1, 0)
    assert good["judge_tokens_per_image"] == [900, 90]  # nine questions of 100 and 10
    assert good["judging_cost"] == pytest.approx((900 * 2 + 90 * 10) / 1e6)


def test_names_with_hyphens_stay_whole_and_styles_are_left_out(folder: Path, serve: Serve, tmp_path: Path) -> None:
    server = serve(toy.honest)
    drawn = harness.evaluate(job(folder, server, "good"), tmp_path / "out", "generate")
    assert drawn["drawn"] == {"good": REFERENCES * PROMPTS} and not server.calls
    rows = Dataset(tmp_path / "out" / "samples" / "good").columns("sample", "level", "kind")
    ids = {row["sample"].rpartition("-")[0] for row in rows}
    assert "live_subject_animal_00_cotton-top_tamarin" in ids and "object_00_rolls-royce_hood_ornament" in ids
    assert len(ids) == REFERENCES and not any("ukiyo" in id for id in ids)
    assert Counter(row["level"] for row in rows) == {"photoreal": 24, "style": 18, "imaginative": 12}
    assert {row["kind"] for row in rows} == {"live_subject/animal", "live_subject/human", "object"}


def test_the_judge_sees_the_right_images_and_answers_three_times(
    folder: Path, serve: Serve, tmp_path: Path, small: dict[str, Any]
) -> None:
    server = serve(toy.honest)
    harness.evaluate(job(folder, server, "good", **small), tmp_path / "out")
    pictures = 3 * 2
    assert len(server.calls) == pictures * 9  # CP, PF, CP debiased; three times each
    kinds: Counter[str] = Counter()
    for call in server.calls:
        messages = call.body["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant", "user"]
        assert call.body["temperature"] == 1.0 and call.body["model"] == "toy-judge"
        seen = toy.pictures(call)
        assert seen and all(image.size == (512, 512) and image.format == "PNG" for image in seen)
        task = call.text()
        if len(seen) == 2:
            kinds["debiased" if "pasted" in task else "concept"] += 1
            assert "Texture" in task and "scene" not in call.text(-1), "the prompt is not the concept judge's business"
        else:
            kinds["prompt"] += 1
            assert "Completeness" in task and "scene" in call.text(-1) and len(seen) == 1
    assert kinds == dict.fromkeys(("concept", "prompt", "debiased"), pictures * 3)


def test_repeats_are_averaged_and_an_answer_outside_0_to_4_is_repaired(
    folder: Path, serve: Serve, tmp_path: Path
) -> None:
    answers = iter([4, 3, 3])

    def act(call: Call) -> Act:
        if call.turns == 5:  # the repair turn
            return say({"score": 1})
        if len(toy.pictures(call)) == 1:
            return say("Score: seven") if len(server.calls) % 2 else say('{"score": 7}')
        return say({"score": next(answers)})

    server = serve(act)
    quick = job(folder, server, "good", references=1, prompts=1)
    quick = quick.model_copy(update={"judge": quick.judge.model_copy(update={"debiased": False})})
    found = harness.evaluate(quick, tmp_path / "out")["methods"]["good"]
    assert found["cp"] == pytest.approx(10 / 12, abs=1e-4) and found["pf"] == 0.25 and "cp_debiased" not in found


def test_scoring_resumes_after_the_server_went_down_and_repeats_no_question(
    folder: Path, serve: Serve, tmp_path: Path, small: dict[str, Any]
) -> None:
    state = {"left": 20}
    answered: list[str] = []

    def act(call: Call) -> Act:
        if state["left"] == 0:
            return refuse(401, "wrong key")
        state["left"] -= 1
        answered.append(json.dumps(call.body))
        return toy.honest(call)

    server = serve(act)
    asked = job(folder, server, "good", **small)
    with pytest.raises(UserError, match="401"):
        harness.evaluate(asked, tmp_path / "out")
    assert len(answered) == 20
    drawn = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "samples" / "good").glob("*.parquet")}
    state["left"] = 1000
    found = harness.evaluate(asked, tmp_path / "out")
    assert len(answered) == 6 * 9, "each question was paid for once"
    assert drawn == {p: p.stat().st_mtime_ns for p in drawn}
    whole = harness.evaluate(job(folder, serve(toy.honest), "good", **small), tmp_path / "other")
    for each in (found, whole):
        each.pop("settings")
    assert steady(found) == steady(whole), "the same inputs give the same numbers"
    again = len(answered)
    harness.evaluate(asked, tmp_path / "out")
    assert len(answered) == again


def test_an_incomplete_line_of_scores_is_scored_again_from_the_cache(
    folder: Path, serve: Serve, tmp_path: Path, small: dict[str, Any]
) -> None:
    server = serve(toy.honest)
    asked = job(folder, server, "good", **small)
    first = harness.evaluate(asked, tmp_path / "out")
    path = tmp_path / "out" / "scores" / "good" / "judge.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    calls = len(server.calls)
    assert steady(harness.evaluate(asked, tmp_path / "out")) == steady(first)
    assert path.read_bytes() == whole and len(server.calls) == calls


def test_the_command_line_generates_and_scores_separately_and_the_page_shows_it(
    folder: Path, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, server = str(tmp_path / "out"), serve(toy.honest)
    asked = ["evaluate", "--suite", "dreambench++", "--data", str(folder), "--baseline", "good", "--baseline", "copy"]
    asked += [
        "--references",
        "3",
        "--prompts",
        "2",
        "--size",
        "32",
        "--device",
        "cpu",
        "--metric",
        "none",
        "--out",
        out,
    ]
    assert app.call([*asked, "--only", "generate"]) == 0 and not server.calls
    judge = ["--judge-endpoint", server.url, "--judge-model", "toy-judge", "--set", "hour_price=2"]
    assert app.call(["evaluate", "--out", out, "--only", "score", *judge]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "good" in printed and printed.strip().endswith("report.html")
    html = (tmp_path / "out" / "report" / "report.html").read_text("utf8")
    for words in ("Not comparable across harnesses", "DreamBooth-LoRA", "the worst", "live_subject/human", "toy-judge"):
        assert words in html, words
    assert "http" not in html.split("</style>")[1].replace(server.url, "") and "<script" not in html
    markdown = (tmp_path / "out" / "report" / "report.md").read_text("utf8")
    assert "| good | 1.000 |" in markdown and "Published, not comparable" in markdown
    assert app.call(["evaluate", "--compare", "good", "copy", "--out", out]) == 0
    assert "CP·PF" in capsys.readouterr().out
    assert suite_report.write(tmp_path / "out").read_text("utf8") == html, "writing twice gives the same page"
