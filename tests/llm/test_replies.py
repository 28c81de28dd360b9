"""Replies that say nothing, say it in the wrong place, or speak another protocol: what is made of each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diptych.llm import schema
from diptych.llm.cache import Cache
from diptych.llm.client import Client
from diptych.llm.question import Outcome, Usage
from llm.ask_some import Number
from llm.chat_server import Act, Call, Serve, say
from llm.counting import Make, number, number_of, right
from raising import raises


@pytest.mark.parametrize("place", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("content", [None, "", " \n"])
def test_an_answer_in_the_reasoning_is_taken_and_marked(
    serve: Serve, endpoint: Make, tmp_path: Path, place: str, content: Any
) -> None:
    def act(call: Call) -> Act:
        thoughts = f'Is it {{"number": 0}}? No: {{"number": {number_of(call)}}}'
        message: dict[str, Any] = {place: thoughts}
        return say(content, **message)

    server = serve(act)
    with Cache(tmp_path / "a.sqlite") as cache, Client(endpoint(server), cache) as client:
        first, again = client.ask(number(4)), client.ask(number(4))
    assert first.answer == again.answer == {"number": 4} and (first.cached, again.cached) == (False, True)
    assert first.evidence() == again.evidence() and first.evidence()["source"] == "reasoning"


def test_reasoning_beside_an_answer_is_left_alone(serve: Serve, endpoint: Make) -> None:
    server = serve(lambda call: say({"number": 1}, reasoning_content='{"number": 2}'))
    with Client(endpoint(server)) as client:
        outcome = client.ask(number(1))
    assert outcome.answer == {"number": 1} and "source" not in outcome.evidence()


def test_an_empty_reply_is_a_failure_that_is_never_cached_and_still_billed(
    serve: Serve, endpoint: Make, tmp_path: Path
) -> None:
    mended: list[bool] = []
    server = serve(lambda call: right(call) if mended else say(None))
    with Cache(tmp_path / "a.sqlite") as cache, Client(endpoint(server), cache, keep_undecided=True) as client:
        outcome = client.ask(number(1))
        assert (outcome.status, outcome.lost, len(cache)) == ("failed", True, 0)
        assert "empty" in outcome.reason and cache.usage() == {"tiny-1": Usage(2, 200, 20)}
        mended.append(True)
        assert client.ask(number(1)).answer == {"number": 1}
        assert cache.usage() == {"tiny-1": Usage(3, 300, 30)}


@pytest.mark.parametrize(
    ("reply", "code", "fact"),
    [(say(None), "endpoint_unreachable", "empty"), (say("I cannot see."), "reply_invalid", "I cannot see.")],
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_server_that_answers_nothing_of_use_stops_the_run_and_is_asked_again_when_mended(
    serve: Serve, endpoint: Make, tmp_path: Path, reply: Act, code: str, fact: str, cached: bool
) -> None:
    mended: list[bool] = []
    server = serve(lambda call: right(call) if mended else reply)
    outcomes: list[Outcome] = []
    with Cache(tmp_path / "a.sqlite") as cache:
        client = Client(endpoint(server, stop_after=6), cache, keep_undecided=cached)
        with raises(code, fact) as caught:
            client.ask_many(map(number, range(200)), outcomes.append)
        counted = int(re.findall(r"(\d+) questions in a row", str(caught.value))[0])
        assert 6 <= counted <= 6 + 4 and "\n" not in str(caught.value)  # some were in flight when it stopped
        assert len(server.calls) <= 2 * (6 + 4) and len(outcomes) < 6
        paid = cache.usage()["tiny-1"].calls
        assert paid == len(server.calls) and client.spent.usage.calls == paid
        mended.append(True)
        # Those that were delivered before the stop may be remembered; what ended the run is not.
        again: list[Outcome] = []
        client.ask_many(map(number, range(200)), again.append)
        assert sum(outcome.status == "answered" for outcome in again) >= 194 + 6 * (not cached)


def test_useless_answers_here_and_there_stop_nothing(serve: Serve, endpoint: Make) -> None:
    server = serve(lambda call: say("?") if number_of(call) % 3 else right(call))
    with Client(endpoint(server, stop_after=3, concurrency=1)) as client:
        assert client.ask_many(map(number, range(30)), lambda outcome: None).undecided == 20


GOOD = '{"number": 7}'


@pytest.mark.parametrize(
    "text",
    [
        f'<think>perhaps {{"number": seven}}</think>{GOOD}',
        f'<thinking>\n{{"number": \n</thinking>\n{GOOD}',
        f'<think>{{"number": 3}}</think> then <THINK>{{"number": 4</THINK> {GOOD}',
        f'{{"number": 1</think>{GOOD}',
        f'[THINK]{{"number": 5, "n[/THINK]{GOOD}',
        f'◁think▷{{"number": 5◁/think▷{GOOD}',
        f'<seed:think>{{"number": 5</seed:think>{GOOD}',
        f'<|channel|>analysis<|message|>{{"number": <|end|><|start|>assistant<|channel|>final<|message|>{GOOD}',
        f'Sketch: {{"number": seven, or {{so}}}}. Now: {GOOD}',
        f"<think>no end, {GOOD}",
    ],
)
def test_a_sketch_among_thoughts_does_not_hide_the_answer_after_it(text: str) -> None:
    assert schema.read(text, Number) == {"number": 7}


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{GOOD}</think>",
        f'<think>x</think>{GOOD} {{"number": 8',
        f'{{"outer": {GOOD}, "x": {{"y": 1}}',
        "<think>" * 2000 + "{" * 50_000,
    ],
)
def test_what_is_only_thought_or_cut_off_is_no_answer(text: str) -> None:
    with pytest.raises(schema.Invalid):
        schema.read(text, Number)


def test_a_mark_of_thoughts_inside_an_answer_is_text() -> None:
    assert schema.read('{"number": 7, "why": "a sign says </think>"}', Number) == {"number": 7}


def stream(call: Call) -> bytes:
    chunk = {"object": "chat.completion.chunk", "choices": [{"delta": {"content": json.dumps({"number": 1})}}]}
    return f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()


def ollama(call: Call, done: bool = True) -> bytes:
    message = {"role": "assistant", "content": '{"number": 1}'}
    return json.dumps({"model": "tiny", "created_at": "2026", "message": message, "done": done}).encode()


@pytest.mark.parametrize(
    ("body", "fact"),
    [
        (stream, "streaming"),
        (lambda call: b": ping\n\n" + stream(call), "streaming"),
        (ollama, "/v1"),
        (lambda call: ollama(call, False) + b"\n" + ollama(call), "/v1"),
        (lambda call: b'{"model": "tiny", "response": "{}", "done": true}', "/v1"),
        (lambda call: b'{"type": "message", "content": [{"type": "text", "text": "{}"}]}', "/v1"),
        (lambda call: b'{"object": "response", "output": []}', "/v1"),
        (lambda call: b'{"choices": [{"text": "{}"}]}', "/v1"),
    ],
)
def test_a_reply_of_another_protocol_is_named_with_the_remedy_at_once(
    serve: Serve, endpoint: Make, body: Callable[[Call], bytes], fact: str
) -> None:
    server = serve(lambda call: Act(body(call)))
    with Client(endpoint(server, concurrency=1)) as client, raises("endpoint_unsuited", fact) as caught:
        client.ask_many(map(number, range(50)), lambda outcome: None)
    assert len(server.calls) == 1 and "\n" not in str(caught.value) and server.url in str(caught.value)
    assert server.calls[0].body["stream"] is False
