"""How a question is answered, by a model with prepared replies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from pydantic import BaseModel

from diptych.llm.answering import AnswerCache, ChatRequest, answer_batch, answer_one
from diptych.llm.cache import Cache
from diptych.llm.local import STOP_AFTER, LocalModel
from diptych.llm.question import GaveUp, Message, Outcome, Question, Reply, Usage, system, user
from raising import raises

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


class Together(Model):
    """The same for several turns at once; `batches` are how many."""

    def __init__(self, *lines: str | Exception) -> None:
        super().__init__(*lines)
        self.batches: list[int] = []

    def __call__(self, requests: Sequence[ChatRequest]) -> list[Reply | GaveUp]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.batches.append(len(requests))
        return [self._one(request) for request in requests]

    def _one(self, request: ChatRequest) -> Reply | GaveUp:
        try:
            return super().__call__(request.messages)
        except GaveUp as error:
            return error


def questions(verdict: type[BaseModel], *texts: str) -> list[Question]:
    return [Question((user(text),), verdict, tag=text) for text in texts]


@pytest.fixture
def question(verdict: type[BaseModel]) -> Question:
    return Question((system("You judge."), user("The same?")), verdict, tag="pair-1")


def test_a_good_answer_needs_one_turn(question: Question) -> None:
    model = Model(GOOD)
    outcome = answer_one(model, question, AnswerCache({}))
    assert (outcome.tag, outcome.status, outcome.answer) == ("pair-1", "answered", {"same": True, "score": 1.0})
    assert outcome.usage == outcome.paid == Usage(1, 10, 2)
    assert [message.role for message in model.heard[0]] == ["system", "user"]


def test_two_bad_answers_are_undecided_and_the_last_is_kept(question: Question) -> None:
    model = Model("well…", BAD)
    outcome = answer_one(model, question, AnswerCache({}))
    assert (outcome.status, outcome.answer, outcome.text) == ("undecided", None, BAD)
    assert "same: Input should be a valid boolean; score: Field required" in outcome.reason
    assert [message.role for message in model.heard[1]] == ["system", "user", "assistant", "user"]


def test_an_empty_answer_is_repaired_without_an_empty_turn(question: Question) -> None:
    model = Model("", GOOD)
    assert answer_one(model, question, AnswerCache({})).status == "answered"
    assert model.heard[1][2].parts == ("(nothing)",)


def test_a_model_lost_between_the_turns_is_a_failure_with_what_was_paid(question: Question) -> None:
    outcome = answer_one(Model(BAD, GaveUp("gone")), question, AnswerCache({}))
    assert (outcome.status, outcome.reason, outcome.text) == ("failed", "gone", BAD)
    assert outcome.paid == Usage(1, 10, 2)
    assert not outcome.cached


def test_the_first_of_two_turns_is_not_paid_for_twice(question: Question, tmp_path: Path) -> None:
    with Cache(tmp_path / "a.sqlite") as cache:
        answer_one(Model(BAD, GaveUp("gone")), question, AnswerCache({}, cache))
        outcome = answer_one(Model(GOOD), question, AnswerCache({}, cache))
        again = answer_one(Model(), question, AnswerCache({}, cache))
    assert (outcome.status, outcome.usage, outcome.paid) == ("answered", Usage(2, 20, 4), Usage(1, 10, 2))
    assert (again.answer, again.usage, again.paid, again.cached) == (outcome.answer, outcome.usage, Usage(), True)
    assert again.key == outcome.key


def test_failures_are_never_cached(question: Question, tmp_path: Path) -> None:
    with Cache(tmp_path / "a.sqlite") as cache:
        answer_one(Model(GaveUp("gone")), question, AnswerCache({}, cache, keep_undecided=True))
        assert len(cache) == 0


def test_another_identity_asks_again(question: Question, tmp_path: Path) -> None:
    with Cache(tmp_path / "a.sqlite") as cache:
        answer_one(Model(GOOD), question, AnswerCache({"model": "a"}, cache))
        model = Model(BAD, BAD)
        assert answer_one(model, question, AnswerCache({"model": "b"}, cache)).status == "undecided"
    assert len(model.heard) == 2


def test_a_local_model_answers_and_counts_like_a_client(question: Question, tmp_path: Path) -> None:
    outcomes: list[Outcome] = []
    with Cache(tmp_path / "a.sqlite") as cache:
        model = LocalModel(Together(GOOD), {"model": "tiny"}, cache)
        spent = model.ask_many([question, question], outcomes.append)
    assert [outcome.status for outcome in outcomes] == ["answered", "answered"]
    assert (spent.questions, spent.answered, spent.cached, spent.usage) == (2, 2, 1, Usage(1, 10, 2))


def test_a_local_model_that_only_fails_stops_the_run(question: Question) -> None:
    outcomes: list[Outcome] = []
    model = LocalModel(Together(*[GaveUp("no memory")] * 50), {})
    with raises("rows_failed", STOP_AFTER, "no memory"):
        model.ask_many([question] * 50, outcomes.append)
    assert len(outcomes) == STOP_AFTER - 1


def test_many_are_answered_in_step_and_only_what_was_wrong_is_asked_again(verdict: type[BaseModel]) -> None:
    model = Together(GOOD, BAD, GaveUp("too long"), "well…", GOOD, BAD)
    found = answer_batch(model, questions(verdict, "a", "b", "c", "d"), AnswerCache({}))
    assert model.batches == [4, 2]
    told = [(outcome.tag, outcome.status, outcome.usage.calls) for outcome in found]
    assert told == [("a", "answered", 1), ("b", "answered", 2), ("c", "failed", 0), ("d", "undecided", 2)]
    assert [turn[0].parts[0] for turn in model.heard] == ["a", "b", "c", "d", "b", "d"]


def test_of_a_batch_only_what_the_cache_lacks_is_asked(verdict: type[BaseModel], tmp_path: Path) -> None:
    with Cache(tmp_path / "a.sqlite") as cache:
        answer_batch(Together(GOOD, GOOD), questions(verdict, "a", "c"), AnswerCache({}, cache))
        model = Together(GOOD)
        found = answer_batch(model, questions(verdict, "a", "b", "c"), AnswerCache({}, cache))
        assert [outcome.cached for outcome in found] == [True, False, True] and model.batches == [1]
        assert answer_batch(Together(), questions(verdict, "a", "b"), AnswerCache({}, cache))[1].cached


def test_the_same_question_twice_in_a_batch_is_asked_once_and_paid_for_once(verdict: type[BaseModel]) -> None:
    model = Together(BAD, GOOD)
    first, second = answer_batch(model, questions(verdict, "a", "a"), AnswerCache({}))
    assert model.batches == [1, 1] and first.answer == second.answer
    assert (first.paid, second.paid) == (Usage(2, 20, 4), Usage()) and first.usage == second.usage


def test_a_local_model_takes_a_generator_batch_by_batch(verdict: type[BaseModel]) -> None:
    drawn: list[str] = []
    answered: list[tuple[str, int]] = []

    def source() -> Iterator[Question]:
        for question in questions(verdict, "a", "b", "c", "d", "e"):
            drawn.append(question.tag)
            yield question

    model = LocalModel(together := Together(*[GOOD] * 5), {}, batch_size=2)
    spent = model.ask_many(source(), lambda outcome: answered.append((outcome.tag, len(drawn))))
    assert together.batches == [2, 2, 1] and spent.answered == 5
    assert answered == [("a", 2), ("b", 2), ("c", 4), ("d", 4), ("e", 5)]
