"""The client against a real server that is slow, wrong, rude or gone."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from diptych.llm.cache import Cache
from diptych.llm.client import Client
from diptych.llm.question import Outcome, Question, Usage
from llm import ask_some
from llm.chat_server import Act, Call, Serve, refuse, say
from llm.counting import Make, number, number_of, right
from raising import raises

KEY = "sk-test-0123456789abcdef"


# ---- many questions, a fifth of the calls gone wrong

TIMEOUT = 4.0
TROUBLE: dict[str, tuple[float, Callable[[Call], Act]]] = {
    "garbage instead of a reply": (4, lambda call: Act(b"<html>\xff bad gateway, but 200")),
    "garbage instead of an answer": (4, lambda call: say("I would rather not.")),
    "truncated JSON": (4, lambda call: say('{"number": ')),
    "another schema": (4, lambda call: say({"numbers": [number_of(call)]})),
    "a reply cut short": (4, lambda call: Act(right(call).body[:60], missing=40)),
    "429": (2, lambda call: refuse(429, "slow down", {"Retry-After": "0.02"})),
    "500": (4, lambda call: refuse(500, "oops")),
    "503": (4, lambda call: Act(b"", 503)),
    "hangs up": (4, lambda call: Act(hang_up=True)),
    "slow": (4, lambda call: right(call, delay=0.1)),
    "time-out": (0.8, lambda call: right(call, delay=2 * TIMEOUT)),
}


@pytest.mark.soak
def test_two_thousand_questions_to_a_bad_server_all_end_answered_undecided_or_failed(
    serve: Serve, endpoint: Make
) -> None:
    attempts: Counter[int] = Counter()
    troubles: Counter[str] = Counter()
    lock = threading.Lock()
    names, weights = list(TROUBLE), [weight for weight, _ in TROUBLE.values()]

    def act(call: Call) -> Act:
        n = number_of(call)
        if n % 100 == 7:
            return say("never JSON")
        if n % 100 == 13:
            return refuse(500, "never well")
        with lock:
            attempts[n] += 1
            draw = random.Random(f"{n} {attempts[n]}")
            name = draw.choices(names, weights)[0] if draw.random() < 0.2 else ""
            troubles[name] += 1
        return TROUBLE[name][1](call) if name else right(call)

    server = serve(act)
    outcomes: list[Outcome] = []
    settings = endpoint(server, timeout=TIMEOUT, concurrency=12, retries=7, backoff=0.005)
    with Client(settings) as client:
        spent = client.ask_many((number(n) for n in range(2000)), outcomes.append)

    assert sorted(int(outcome.tag) for outcome in outcomes) == list(range(2000))
    by_status = {status: [o for o in outcomes if o.status == status] for status in ("answered", "undecided", "failed")}
    for outcome in by_status["answered"]:
        assert outcome.answer == {"number": int(outcome.tag)}
    for outcome in by_status["undecided"]:
        assert outcome.reason and outcome.text and outcome.answer is None
        assert outcome.usage.calls == 2
    for outcome in by_status["failed"]:
        assert "8 tries" in outcome.reason and outcome.answer is None
    assert {o.status for o in outcomes if int(o.tag) % 100 == 7} == {"undecided"}
    assert {o.status for o in outcomes if int(o.tag) % 100 == 13} == {"failed"}
    assert len(by_status["answered"]) > 1850
    assert (spent.questions, spent.answered) == (2000, len(by_status["answered"]))
    assert (spent.undecided, spent.failed) == (len(by_status["undecided"]), len(by_status["failed"]))
    assert troubles.keys() == {"", *TROUBLE}
    assert 0.15 < 1 - troubles[""] / troubles.total() < 0.25


def test_a_killed_run_pays_again_for_at_most_the_calls_in_flight(serve: Serve, tmp_path: Path) -> None:
    def act(call: Call) -> Act:
        first_of_repaired = number_of(call) % 5 == 0 and call.turns == 1
        return say("not yet JSON", 0.02) if first_of_repaired else right(call, 0.02)

    server = serve(act)
    cache = tmp_path / "answers.sqlite"
    script = [sys.executable, ask_some.__file__, server.url, str(cache), "200"]
    process = subprocess.Popen(script)
    until = time.monotonic() + 300
    while len(server.calls) < 90:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(server.calls)
    assert before < 240

    outcomes = ask_some.ask(server.url, str(cache), 200)
    assert {outcome.tag for outcome in outcomes if outcome.status == "answered"} == {str(n) for n in range(200)}
    # 200 questions, 40 of which take two turns; every one of these 240 calls is different.
    assert 240 <= len(server.calls) <= 240 + ask_some.CONCURRENCY
    with sqlite3.connect(cache) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    paid = len(server.calls)
    again = ask_some.ask(server.url, str(cache), 200)
    assert len(server.calls) == paid
    assert all(outcome.cached and outcome.answer == {"number": int(outcome.tag)} for outcome in again)


# ---- what goes out, and what comes back


def test_the_schema_is_requested_and_told_and_pictures_go_as_data(serve: Serve, endpoint: Make) -> None:
    server = serve(right)
    with Client(endpoint(server, extra={"seed": 5}, max_tokens=99)) as client:
        outcome = client.ask(number(3, Image.new("RGB", (4, 4))))
    body = server.calls[0].body
    assert outcome.answer == {"number": 3}
    assert (body["model"], body["seed"], body["max_tokens"], body["temperature"]) == ("tiny", 5, 99, 0.0)
    assert body["response_format"]["json_schema"]["schema"]["properties"] == {"number": {"type": "integer"}}
    text, shown, form = body["messages"][0]["content"]
    assert text["text"] == "number 3"
    assert shown["image_url"]["url"].startswith("data:image/png;base64,")
    assert '"number"' in form["text"]
    assert "Authorization" not in server.calls[0].headers


def test_a_wrong_answer_gets_one_repair_turn_that_says_what_is_wrong(serve: Serve, endpoint: Make) -> None:
    server = serve(lambda call: say({"number": "seven"}) if call.turns == 1 else right(call))
    with Client(endpoint(server)) as client:
        outcome = client.ask(number(7))
    assert outcome.answer == {"number": 7}
    assert outcome.usage == Usage(2, 200, 20)
    _, said, repair = server.calls[1].body["messages"]
    assert said == {"role": "assistant", "content": '{"number": "seven"}'}
    assert "number: Input should be a valid integer" in repair["content"]


def test_tokens_and_money_are_counted(serve: Serve, endpoint: Make) -> None:
    server = serve(right)
    with Client(endpoint(server, input_price=1.0, output_price=10.0)) as client:
        spent = client.ask_many([number(n) for n in range(5)], lambda outcome: None)
    assert spent.usage == Usage(5, 500, 50)
    assert spent.money == pytest.approx(500e-6 + 500e-6)
    assert spent.requests == 5
    assert spent.line() == "5 questions: 5 answered, 5 requests, 500 tokens in, 50 out, 0.0010 spent"


def test_a_second_run_costs_nothing_even_at_another_address_and_without_a_key(
    serve: Serve, endpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    server, other = serve(right), serve(right)
    with Cache(tmp_path / "a.sqlite") as cache:
        Client(endpoint(server, api_key_env="TEST_KEY"), cache).ask_many(map(number, range(9)), lambda outcome: None)
        monkeypatch.delenv("TEST_KEY")
        moved = Client(endpoint(other, api_key_env="TEST_KEY", json_mode="none", input_price=1.0), cache)
        spent = moved.ask_many(map(number, range(9)), lambda outcome: None)
        hotter = Client(endpoint(other, temperature=0.5), cache).ask(number(0))
    assert len(server.calls) == 9
    assert (spent.cached, spent.requests, spent.money) == (9, 0, 0.0)
    assert not hotter.cached


def test_votes_are_asked_and_cached_apart(serve: Serve, endpoint: Make, tmp_path: Path) -> None:
    server = serve(right)
    with Cache(tmp_path / "a.sqlite") as cache, Client(endpoint(server), cache) as client:
        votes = [client.ask(number(1, sample=vote)) for vote in (0, 1, 2, 1)]
    assert len(server.calls) == 3
    assert [vote.cached for vote in votes] == [False, False, False, True]


@pytest.mark.parametrize(("keep", "calls"), [(False, 4), (True, 2)])
def test_undecided_questions_are_remembered_only_if_asked(
    serve: Serve, endpoint: Make, tmp_path: Path, keep: bool, calls: int
) -> None:
    server = serve(lambda call: say("no"))
    with Cache(tmp_path / "a.sqlite") as cache, Client(endpoint(server), cache, keep_undecided=keep) as client:
        outcomes = [client.ask(number(1)) for _ in range(2)]
    assert [outcome.status for outcome in outcomes] == ["undecided", "undecided"]
    assert len(server.calls) == calls


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (say(None, refusal="I cannot judge people"), "the model refuses: I cannot judge people"),
        (say("", finish="content_filter"), "its filter says no"),
        (say('{"number": 1', finish="length"), "longer than max_tokens"),
    ],
)
def test_what_a_second_try_cannot_mend_gets_none(serve: Serve, endpoint: Make, reply: Act, reason: str) -> None:
    server = serve(lambda call: reply)
    with Client(endpoint(server)) as client:
        outcome = client.ask(number(1))
    assert outcome.status == "undecided" and reason in outcome.reason
    assert len(server.calls) == 1


# ---- how a run ends, and its limits


def test_a_stopped_run_still_delivers_what_was_under_way(serve: Serve, endpoint: Make) -> None:
    together = threading.Barrier(4)

    def act(call: Call) -> Act:
        together.wait(60)
        return refuse(401, "no") if number_of(call) == 3 else right(call, delay=0.5)

    server = serve(act)
    outcomes: list[Outcome] = []
    with Client(endpoint(server)) as client, raises("endpoint_refused", "401: no"):
        client.ask_many(map(number, range(100)), outcomes.append)
    assert {outcome.tag for outcome in outcomes} == {"0", "1", "2"}
    assert len(server.calls) == 4


def test_a_server_that_is_gone_stops_the_run(serve: Serve, endpoint: Make) -> None:
    server = serve(right)
    settings = endpoint(server, stop_after=5, retries=1, concurrency=2)
    server.close()
    outcomes: list[Outcome] = []
    with Client(settings) as client, raises("endpoint_unreachable", "5 questions"):
        client.ask_many(map(number, range(1000)), outcomes.append)
    assert {outcome.status for outcome in outcomes} == {"failed"}
    assert len(outcomes) <= 5


def test_no_more_calls_than_allowed_are_under_way(serve: Serve, endpoint: Make) -> None:
    server = serve(lambda call: right(call, delay=0.05))
    with Client(endpoint(server, concurrency=3)) as client:
        client.ask_many(map(number, range(12)), lambda outcome: None)
    assert server.most_at_once <= 3


def test_the_rate_limit_spaces_what_the_server_sees(serve: Serve, endpoint: Make) -> None:
    server = serve(right)
    start = time.monotonic()
    with Client(endpoint(server, requests_per_minute=600)) as client:
        client.ask_many(map(number, range(11)), lambda outcome: None)
    assert server.calls[-1].time - start >= 1.0


def test_questions_are_taken_only_as_they_can_be_asked(serve: Serve, endpoint: Make) -> None:
    server = serve(right)
    taken, settled, furthest = 0, 0, 0

    def questions() -> Iterator[Question]:
        nonlocal taken, furthest
        for n in range(40):
            taken += 1
            furthest = max(furthest, taken - settled)
            yield number(n)

    def count(outcome: Outcome) -> None:
        nonlocal settled
        settled += 1

    with Client(endpoint(server, concurrency=4)) as client:
        client.ask_many(questions(), count)
    assert (taken, settled) == (40, 40)
    assert furthest <= 5


def test_an_error_of_the_caller_ends_the_run_and_is_raised(serve: Serve, endpoint: Make) -> None:
    server = serve(right)

    def refuse_all(outcome: Outcome) -> None:
        raise RuntimeError("disk full")

    with Client(endpoint(server)) as client, pytest.raises(RuntimeError, match="disk full"):
        client.ask_many(map(number, range(1000)), refuse_all)
    assert len(server.calls) < 20
