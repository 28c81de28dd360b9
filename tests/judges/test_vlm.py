"""The vision-language judge and a real server: its requests, how votes decide, and what is stored."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diptych.judges.vlm import VlmJudge, answer_type, count
from diptych.llm import schema
from diptych.llm.cache import Cache
from diptych.llm.client import Client
from diptych.llm.endpoint import Endpoint
from diptych.llm.question import Outcome
from diptych.recipe import tasks
from llm.chat_server import Act, Call, ChatServer, Serve, refuse, say


def endpoint(server: ChatServer, **values: Any) -> Endpoint:
    quick: dict[str, Any] = {"timeout": 20.0, "backoff": 0.01, "retries": 2, "concurrency": 4, "temperature": 0.7}
    return Endpoint(base_url=server.url, model="tiny", **(quick | values))


def answer(same: bool, confidence: int = 5, steps: int = 3) -> dict[str, Any]:
    texts = {f"step_{n}": f"about step {n}" for n in range(1, steps + 1)}
    return {**texts, "same": same, "confidence": confidence, "reason": "its markings"}


def outcome(answer: dict[str, Any] | None, status: Any = "undecided") -> Outcome:
    return Outcome("p", "answered" if answer else status, answer, "" if answer else "why")


RED, BLUE = Image.new("RGB", (16, 16), (200, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 200))


def test_the_model_sees_both_panels_in_order_and_every_step_of_the_task(serve: Serve) -> None:
    server = serve(lambda call: say(answer(True)))
    task = tasks.load("subject")
    with Client(endpoint(server)) as client:
        VlmJudge(client, task).decide([("p", RED, BLUE)])
    (call,) = server.calls
    parts = call.body["messages"][1]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    shown = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).getpixel((0, 0)) for url in urls]
    assert shown == [(200, 0, 0), (0, 0, 200)]
    for number, question in enumerate(task.curation.questions, 1):
        assert f"Step {number}: {question}" in call.text(1)
    fields = call.body["response_format"]["json_schema"]["schema"]["required"]
    assert fields == ["step_1", "step_2", "step_3", "same", "confidence", "reason"]


def test_a_task_with_other_steps_has_another_answer() -> None:
    assert schema.full_schema(answer_type(1))["required"] == ["step_1", "same", "confidence", "reason"]
    with pytest.raises(schema.Invalid, match="confidence"):
        schema.read(json.dumps(answer(True, 6)), answer_type(3))
    with pytest.raises(schema.Invalid, match="same"):
        schema.read(json.dumps(answer(True) | {"same": "yes"}), answer_type(3))
    with pytest.raises(schema.Invalid, match="step_3"):
        schema.read(json.dumps(answer(True, steps=2)), answer_type(3))


@pytest.mark.parametrize(
    ("votes", "verdict", "score", "reason"),
    [
        ([(True, 5)] * 3, "same", 1.0, ""),
        ([(False, 5)] * 3, "different", 0.0, ""),
        ([(True, 1)], "same", 0.6, ""),
        ([(True, 5), (True, 4), (False, 5)], "same", 0.65, ""),
        ([(False, 5), (True, 1), (False, 5)], "different", 1 / 3, ""),
        ([(True, 3), None, None], "same", 0.8, ""),
        ([(True, 5), (False, 1)], "undecided", math.nan, "the votes are split"),
        ([(True, 5), (False, 1), None], "undecided", math.nan, "the votes are split"),
        ([None, None], "undecided", math.nan, "no valid answer"),
    ],
)
def test_the_majority_of_the_decided_votes_is_the_verdict(
    votes: list[tuple[bool, int] | None], verdict: str, score: float, reason: str
) -> None:
    judgement = count([outcome(answer(*vote) if vote else None) for vote in votes])
    assert (judgement.verdict, judgement.reason, len(judgement.votes)) == (verdict, reason, len(votes))
    assert judgement.score == pytest.approx(score, nan_ok=True)


def test_a_pair_that_could_not_be_asked_about_is_told_apart_from_one_without_a_valid_answer() -> None:
    assert count([outcome(None, "failed")] * 2).reason == "no reply"
    assert count([outcome(None, "failed"), outcome(None)]).reason == "no valid answer"


@pytest.mark.parametrize(
    ("others", "verdict"),
    [([], "lost"), ([None], "lost"), ([True], "same"), ([True, False], "lost"), ([True, True, False], "same")],
)
def test_a_vote_without_a_reply_is_no_verdict_unless_the_others_are(others: list[bool | None], verdict: str) -> None:
    lost = Outcome("p", "failed", None, "the server says 503", lost=True)
    judgement = count([lost, *(outcome(None if vote is None else answer(vote)) for vote in others)])
    assert judgement.verdict == verdict
    assert judgement.reason == ("the server says 503" if verdict == "lost" else "")


def test_votes_are_asked_apart_and_each_is_kept_whole(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda call: say(answer(call.number != 1, confidence=4)))
    with Cache(tmp_path / "a.sqlite") as cache, Client(endpoint(server, concurrency=1), cache) as client:
        judge = VlmJudge(client, tasks.load("subject"), votes=3)
        judgement = judge.decide([("p", RED, BLUE)])["p"]
        assert judge.decide([("other name", RED, BLUE)])["other name"] == judgement
    assert len(server.calls) == 3
    assert (judgement.verdict, [vote["answer"]["same"] for vote in judgement.votes]) == ("same", [True, False, True])
    assert len({vote["key"] for vote in judgement.votes}) == 3
    first = judgement.votes[0]
    assert (first["status"], first["model"], first["tokens"]) == ("answered", "tiny-1", [100, 10])
    assert first["answer"]["step_2"] == "about step 2" and first["answer"]["reason"] == "its markings"
    json.dumps(judgement.votes, allow_nan=False)


def test_no_answer_and_no_reply_are_outcomes_with_their_reason(serve: Serve) -> None:
    def act(call: Call) -> Act:
        if call.number < 2:
            return say("they look alike to me")
        return refuse(400, "picture too small")

    server = serve(act)
    with Client(endpoint(server, concurrency=1)) as client:
        judgements = VlmJudge(client, tasks.load("subject")).decide([("p", RED, BLUE), ("q", BLUE, RED)])
    assert [(judgements[name].verdict, judgements[name].reason) for name in "pq"] == [
        ("undecided", "no valid answer"),
        ("undecided", "no reply"),
    ]
    assert "no JSON object" in judgements["p"].votes[0]["reason"] and "alike" in judgements["p"].votes[0]["text"]
    assert "picture too small" in judgements["q"].votes[0]["reason"]


def test_a_broken_picture_costs_its_own_pair(serve: Serve) -> None:
    server = serve(lambda call: say(answer(True)))
    with Client(endpoint(server)) as client:
        judgements = VlmJudge(client, tasks.load("subject")).decide([("p", b"no picture", BLUE), ("q", RED, BLUE)])
    assert (judgements["p"].verdict, judgements["p"].reason, judgements["q"].verdict) == (
        "undecided",
        "no reply",
        "same",
    )
