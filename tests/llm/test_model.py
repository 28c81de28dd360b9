"""A model opened by its settings, asked many questions on a real server, and what is kept of the answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from diptych.errors import UserError
from diptych.llm.client import NobodyAnswers, answers, open_model
from diptych.llm.endpoint import Endpoint
from diptych.llm.question import Question, user
from llm.chat_server import Act, Call, Serve, refuse, say
from raising import raises

Make = Callable[..., Endpoint]


def questions(verdict: type[BaseModel], count: int) -> list[Question]:
    return [Question((user(f"pair {n}"),), verdict, tag=str(n)) for n in range(count)]


def test_every_question_has_its_outcome_under_its_own_tag(
    serve: Serve, endpoint: Make, verdict: type[BaseModel]
) -> None:
    def act(call: Call) -> Act:
        if "pair 2" in call.text():
            return refuse(400, "too long")
        return say({"same": "pair 1" in call.text(), "score": 0.5})

    found = answers(open_model(endpoint(serve(act)), cache=None), questions(verdict, 4))
    assert {tag: outcome.status for tag, outcome in found.items()} == {
        "0": "answered",
        "1": "answered",
        "2": "failed",
        "3": "answered",
    }
    told = {tag: outcome.evidence() for tag, outcome in found.items()}
    assert told["1"]["answer"] == {"same": True, "score": 0.5} and told["1"]["tokens"] == [100, 10]
    assert "answer" not in told["2"] and "too long" in told["2"]["reason"]


def test_what_is_answered_or_undecided_is_asked_once_and_without_a_file_each_time(
    serve: Serve, endpoint: Make, verdict: type[BaseModel], tmp_path: Path
) -> None:
    server = serve(lambda call: say("never JSON"))
    for cache, calls in ((tmp_path / "run" / "answers.sqlite", 2), (tmp_path / "run" / "answers.sqlite", 2), (None, 4)):
        (outcome,) = answers(open_model(endpoint(server), cache=cache), questions(verdict, 1)).values()
        assert outcome.status == "undecided"
        assert len(server.calls) == calls  # the answer and its repair


def test_a_home_folder_in_the_files_name_is_understood(
    serve: Serve, endpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    open_model(endpoint(serve(lambda call: say(""))), cache="~/answers.sqlite")
    assert (tmp_path / "answers.sqlite").is_file()


def test_a_model_that_cannot_answer_at_all_is_one_line_that_stops_the_stage(
    serve: Serve, endpoint: Make, verdict: type[BaseModel]
) -> None:
    server = serve(lambda call: refuse(401, "bad key"))
    with raises("endpoint_refused", "bad key", kind=NobodyAnswers) as caught:
        answers(open_model(endpoint(server), cache=None), questions(verdict, 3))
    assert caught.value.stops and "\n" not in str(caught.value)


def test_a_local_model_that_does_not_open_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path / "none")) as caught:
        open_model(None, str(tmp_path / "none"), cache=None)
    assert "\n" not in str(caught.value)
