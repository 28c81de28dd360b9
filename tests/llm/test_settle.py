"""How a question is settled, by a model that says what it is told to say."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from diptych.errors import UserError
from diptych.llm.cache import Cache
from diptych.llm.local import STOP_AFTER, LocalModel
from diptych.llm.outcome import GaveUp, Outcome, Reply, Usage
from diptych.llm.question import Message, Question, system, user
from diptych.llm.settle import Memory, settle

GOOD, BAD = '{"same": true, "score": 1.0}', '{"same": "perhaps"}'


class Model:
    """Says its lines one after the other; an exception among them is raised."""

    def __init__(self, *lines: str | Exception) -> None:
        self.lines = list(lines)
        self.heard: list[tuple[Message, ...]] = []

    def __call__(self, messages: tuple[Message, ...]) -> Reply:
        self.heard.append(messages)
        line = self.lines.pop(0)
        if isinstance(line, Exception):
            raise line
        return Reply(line, "tiny", Usage(1, 10, 2))


@pytest.fixture
def question(verdict: type[BaseModel]) -> Question:
    return Question((system("You judge."), user("The same?")), verdict, tag="pair-1")


def test_a_good_answer_needs_one_turn(question: Question) -> None:
    model = Model(GOOD)
    outcome = settle(model, question, Memory({}))
    assert (outcome.tag, outcome.status, outcome.answer) == ("pair-1", "answered", {"same": True, "score": 1.0})
    assert outcome.usage == outcome.paid == Usage(1, 10, 2)
    assert [message.role for message in model.heard[0]] == ["system", "user"]


def test_two_bad_answers_are_undecided_and_the_last_is_kept(question: Question) -> None:
    model = Model("well…", BAD)
    outcome = settle(model, question, Memory({}))
    assert (outcome.status, outcome.answer, outcome.text) == ("undecided", None, BAD)
    assert "same: Input should be a valid boolean; score: Field required" in outcome.reason
    assert [message.role for message in model.heard[1]] == ["system", "user", "assistant", "user"]


def test_an_empty_answer_is_repaired_without_an_empty_turn(question: Question) -> None:
    model = Model("", GOOD)
    assert settle(model, question, Memory({})).status == "answered"
    assert model.heard[1][2].parts == ("(nothing)",)


def test_a_model_lost_between_the_turns_is_a_failure_with_what_was_paid(question: Question) -> None:
    outcome = settle(Model(BAD, GaveUp("gone")), question, Memory({}))
    assert (outcome.status, outcome.reason, outcome.text) == ("failed", "gone", BAD)
    assert outcome.paid == Usage(1, 10, 2)
    assert not outcome.cached


def test_the_first_of_two_turns_is_not_paid_for_twice(question: Question, tmp_path: Path) -> None:
    with Cache(tmp_path / "a.sqlite") as cache:
        settle(Model(BAD, GaveUp("gone")), question, Memory({}, cache))
        outcome = settle(Model(GOOD), question, Memory({}, cache))
        again = settle(Model(), question, Memory({}, cache))
    assert (outcome.status, outcome.usage, outcome.paid) == ("answered", Usage(2, 20, 4), Usage(1, 10, 2))
    assert (again.answer, again.usage, again.paid, again.cached) == (outcome.answer, outcome.usage, Usage(), True)
    assert again.key == outcome.key


def test_failures_are_never_cached(question: Question, tmp_path: Path) -> None:
    with Cache(tmp_path / "a.sqlite") as cache:
        settle(Model(GaveUp("gone")), question, Memory({}, cache, keep_undecided=True))
        assert len(cache) == 0


def test_another_identity_asks_anew(question: Question, tmp_path: Path) -> None:
    with Cache(tmp_path / "a.sqlite") as cache:
        settle(Model(GOOD), question, Memory({"model": "a"}, cache))
        model = Model(BAD, BAD)
        assert settle(model, question, Memory({"model": "b"}, cache)).status == "undecided"
    assert len(model.heard) == 2


def test_a_local_model_settles_and_counts_like_a_client(question: Question, tmp_path: Path) -> None:
    outcomes: list[Outcome] = []
    with Cache(tmp_path / "a.sqlite") as cache:
        model = LocalModel(Model(GOOD), {"model": "tiny"}, cache)
        spent = model.ask_many([question, question], outcomes.append)
    assert [outcome.status for outcome in outcomes] == ["answered", "answered"]
    assert (spent.questions, spent.answered, spent.cached, spent.usage) == (2, 2, 1, Usage(1, 10, 2))


def test_a_local_model_that_only_fails_stops_the_run(question: Question) -> None:
    outcomes: list[Outcome] = []
    model = LocalModel(Model(*[GaveUp("no memory")] * 50), {})
    with pytest.raises(UserError, match="20 questions in a row failed, the last because no memory"):
        model.ask_many([question] * 50, outcomes.append)
    assert len(outcomes) == STOP_AFTER - 1
